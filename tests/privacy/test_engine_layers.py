"""Every kind of layer, on both paths of the engine, against a loop over the records."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_dp.models import WSConv2d
from lightning_dp.privacy.engines.standardize import standardized_filters
from tests.privacy.gradients import RECORDS, check, perturbed


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Shared(nn.Module):
    """A module that is called twice, and a weight that two modules share."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


class CalledTwice(nn.Module):
    """A convolution, with standardised filters or without, and norms that are called twice."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.last = nn.RMSNorm(5)

    def forward(self, x):
        for _ in range(2):
            x = self.last(torch.tanh(self.norm(self.conv(x))))
        return x


class Tied(nn.Module):
    """A table that is looked up and used as the last linear map."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, x):
        return F.linear(torch.tanh(self.table(x)), self.table.weight)


class Direct(nn.Module):
    """Parameters used without a layer: class token, positions, layer scale, a product, a computed weight."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 4, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.product = nn.Parameter(torch.randn(4, 3))
        self.raw = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = torch.tanh(x * self.scale) @ self.product
        return F.linear(x, F.softplus(self.raw)) + 0.1 * self.raw.square().sum()


class Attention(nn.Module):
    def __init__(self, batch_first, need_weights, cross):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=4 if cross == "widths" else None)
        self.flags = need_weights, cross
        self.other = nn.Linear(8, 4 if cross == "widths" else 8)

    def forward(self, x):
        need_weights, cross = self.flags
        key = self.other(x) if cross else x
        return self.attention(x, key, torch.sin(x) if cross else x, need_weights=need_weights)


class InPlace(nn.Module):
    """Overwrites the outputs of its layers, as torchvision's residual networks do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.linear = nn.Linear(4, 4)
        self.last = nn.LayerNorm(4)

    def forward(self, x):
        out = self.conv(x)
        out += 1
        out = self.norm(out)
        out += x.sum(1, keepdim=True)
        out = self.linear(F.relu(out, inplace=True).mean((2, 3)))
        out *= 2
        out = self.last(out)
        out += 1
        return out


class Custom(torch.autograd.Function):
    """A layer of a user, with a backward pass of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale):
        return x * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        x, scale = ctx.saved_tensors
        return grads[0] * scale, (grads[0] * x).sum_to_size(scale.shape)


class Customised(nn.Linear):
    def forward(self, x):
        return Custom.apply(super().forward(x), self.bias)


class StandardizedTwice(nn.Module):
    """Standardised filters that are used twice, and whose parameter is used by itself as well."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.derived = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        filters = standardized_filters(self.weight)
        x = F.conv2d(torch.tanh(F.conv2d(x, filters, padding=1)), filters, padding=1)
        x = F.conv2d(x, standardized_filters(self.weight.tanh())) + F.conv2d(x, self.weight)
        return F.linear(x.mean((2, 3)), standardized_filters(self.derived.T))


IMAGES, SEQUENCES, VECTORS = (RECORDS, 4, 6, 5), (RECORDS, 5, 6), (RECORDS, 6)
LAYERS = {
    "linear": (lambda: nn.Linear(6, 3), VECTORS),
    "linear, no bias": (lambda: nn.Linear(6, 3, bias=False), VECTORS),
    "linear on a sequence": (lambda: nn.Linear(6, 3), SEQUENCES),
    "linear on a grid": (lambda: nn.Linear(5, 3), IMAGES),
    "conv1d": (lambda: nn.Conv1d(5, 4, 3, stride=2, padding=1, dilation=2), SEQUENCES),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), IMAGES),
    "conv2d, 1x1": (lambda: nn.Conv2d(4, 6, 1, bias=False), IMAGES),
    "conv2d, uneven": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(0, 1)), IMAGES),
    "conv2d, stride": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), IMAGES),
    "conv2d, dilation": (lambda: nn.Conv2d(4, 6, 2, dilation=2), IMAGES),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), IMAGES),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), IMAGES),
    "conv2d, same": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same"), IMAGES),
    "conv2d, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), IMAGES),
    "conv2d, reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGES),
    "conv2d, standardised": (lambda: WSConv2d(4, 6, 3, padding=1), IMAGES),
    "conv2d, standardised, 1x1": (lambda: WSConv2d(4, 6, 1, bias=False), IMAGES),
    "conv2d, standardised, stride": (lambda: WSConv2d(4, 6, 3, stride=2, padding=1), IMAGES),
    "conv2d, standardised, uneven": (lambda: WSConv2d(4, 6, (3, 2), padding=(0, 1), dilation=(1, 2)), IMAGES),
    "conv2d, standardised, groups": (lambda: WSConv2d(4, 6, 3, groups=2), IMAGES),
    "standardised twice": (lambda: StandardizedTwice(), IMAGES),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (RECORDS, 2, 4, 4, 4)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 3, 2), IMAGES),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=2), "ids"),
    "group norm": (lambda: nn.GroupNorm(2, 4), IMAGES),
    "group norm on vectors": (lambda: nn.GroupNorm(2, 6), VECTORS),
    "layer norm": (lambda: nn.LayerNorm(6), SEQUENCES),
    "layer norm, two axes": (lambda: nn.LayerNorm((6, 5), bias=False), IMAGES),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGES),
    "rms norm": (lambda: nn.RMSNorm(6), SEQUENCES),
    "prelu": (lambda: nn.PReLU(4), IMAGES),
    "custom function": (lambda: Customised(6, 3), VECTORS),
    "module called twice": (lambda: Shared(), VECTORS),
    "convolution called twice": (lambda: CalledTwice(nn.Conv2d), IMAGES),
    "standardised convolution called twice": (lambda: CalledTwice(WSConv2d), IMAGES),
    "tied table": (lambda: Tied(), "ids"),
    "direct parameters": (lambda: Direct(), (RECORDS, 3, 4)),
    "in place": (lambda: InPlace(), (RECORDS, 2, 4, 4)),
    "self-attention": (lambda: Attention(True, False, ""), (RECORDS, 5, 8)),
    "self-attention, weights": (lambda: Attention(False, True, ""), (RECORDS, 5, 8)),
    "cross-attention": (lambda: Attention(True, True, "same"), (RECORDS, 5, 8)),
    "cross-attention, widths": (lambda: Attention(False, False, "widths"), (RECORDS, 5, 8)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), (RECORDS, 5, 8)),
}


def inputs(shape):
    return torch.randint(0, 7, (RECORDS, 6)) if shape == "ids" else torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_the_loop_over_records(name):
    make, shape = LAYERS[name]
    check(perturbed(make()), inputs(shape))


@pytest.mark.parametrize(
    "name",
    ["conv2d", "conv2d, stride", "conv2d, groups", "conv2d, standardised", "linear on a sequence", "group norm"],
)
def test_views_of_a_record_are_averaged_before_the_clip(name):
    make, shape = LAYERS[name]
    views = torch.randn(RECORDS, 4, *shape[1:])
    check(perturbed(make()), views, views=True)


def test_attention_takes_views():
    check(perturbed(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)), torch.randn(RECORDS, 3, 5, 8), views=True)
