"""Slow, obviously right versions: loops over records."""

import torch


def record_gradients(net, loss, images, labels):
    """Gradients of single records by plain autograd, as a list of flat rows."""
    rows = []
    for image, label in zip(images, labels, strict=True):
        value = loss(net(image[None]), label[None])
        gradients = torch.autograd.grad(value, [p for p in net.parameters() if p.requires_grad])
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    return rows


def clipped_sum(rows, max_norm, clipping="flat"):
    """Sum of rows after clipping, by the papers' formulas."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        norm = row.norm()
        total += row * (min(1.0, max_norm / norm) if clipping == "flat" else max_norm / (norm + 0.01))
    return total
