"""The two small tanh networks that private training is usually compared on.

Tanh bounds the activations, and with them the gradients: Papernot et al. 2021 (arXiv 2007.14191) found it better than
ReLU under clipping and noise. The layers are those of Tables 8 and 9 of Tramer and Boneh 2021 (arXiv 2011.11660),
recalled rather than read again; the parameter counts agree with the published ones (26,010 and about 550,000).
"""

from torch import Tensor, nn


class MNISTTanhCNN(nn.Module):
    """The 26,010-parameter network for MNIST and FashionMNIST.

    Args:
        num_classes: number of logits.
        in_channels: channels of the 28x28 images.

    Example:
        >>> sum(p.numel() for p in MNISTTanhCNN().parameters())
        26010
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 16, 8, stride=2, padding=2),  # 28 -> 13
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),  # 13 -> 12
            nn.Conv2d(16, 32, 4, stride=2),  # 12 -> 5
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),  # 5 -> 4
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 32),
            nn.Tanh(),
            nn.Linear(32, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of normalised images (n, in_channels, 28, 28)."""
        logits: Tensor = self.layers(images)
        return logits


class CIFARTanhCNN(nn.Module):
    """The 550,570-parameter network for CIFAR-10: three pairs of 3x3 convolutions and two linear layers.

    Args:
        num_classes: number of logits.
        in_channels: channels of the 32x32 images.

    Example:
        >>> sum(p.numel() for p in CIFARTanhCNN().parameters())
        550570
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in (32, 64, 128):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.Tanh()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)]
            channels = width
        layers += [nn.Flatten(), nn.Linear(128 * 4 * 4, 128), nn.Tanh(), nn.Linear(128, num_classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of normalised images (n, in_channels, 32, 32)."""
        logits: Tensor = self.layers(images)
        return logits
