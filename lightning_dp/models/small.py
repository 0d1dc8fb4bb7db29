"""Small networks of unlike kinds, to see whether a release teaches others than the network it was made with.

None has BatchNorm. All take (n, in_channels, image_size, image_size), 28 or 32 pixels.
"""

from functools import partial

from torch import nn
from torchvision.models import resnet18

from lightning_dp.models.convnet import ConvNet


class MLP(nn.Sequential):
    """Two hidden layers of 128 units."""

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(in_channels * image_size**2, 128), nn.ReLU(),
            nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, num_classes),
        )  # fmt: skip


class LeNet(nn.Sequential):
    """Two convolutions of 5 pixels and three linear layers (LeCun et al. 1998), with ReLU and max pooling."""

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> None:
        side = ((image_size + (4 if image_size == 28 else 0) - 4) // 2 - 4) // 2
        super().__init__(
            nn.Conv2d(in_channels, 6, 5, padding=2 if image_size == 28 else 0), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(16 * side**2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes),
        )  # fmt: skip


class SmallAlexNet(nn.Sequential):
    """Five convolutions in AlexNet's order (Krizhevsky et al. 2012), for small images, and one linear layer."""

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> None:
        padding = 4 if image_size == 28 else 2
        side = (image_size + 2 * padding - 4) // 8
        super().__init__(
            nn.Conv2d(in_channels, 128, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(128, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(192, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 192, 3, padding=1), nn.ReLU(),
            nn.Conv2d(192, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(192 * side**2, num_classes),
        )  # fmt: skip


class SmallVGG11(nn.Sequential):
    """The eight convolutions of VGG-11 (Simonyan and Zisserman 2015) with group norm, and one linear layer."""

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> None:
        layers: list[nn.Module] = []
        channels, padding = in_channels, 3 if image_size == 28 else 1
        for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=padding), nn.GroupNorm(32, width), nn.ReLU()]
            channels, padding = width, 1
        super().__init__(*layers, nn.Flatten(), nn.Linear(512, num_classes))


def small_resnet18(in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> nn.Module:
    """ResNet-18 of torchvision with group norm, and a first layer of 3 pixels without pooling, for small images."""
    net: nn.Module = resnet18(norm_layer=partial(nn.GroupNorm, 32), num_classes=num_classes)
    net.conv1 = nn.Conv2d(in_channels, 64, 3, padding=3 if image_size == 28 else 1, bias=False)
    net.maxpool = nn.Identity()
    return net


def small_networks(in_channels: int, image_size: int, num_classes: int) -> dict[str, nn.Module]:
    """One of each kind, by name, in the order of Private Set Generation's table.

    Example:
        >>> list(small_networks(1, 28, 10))
        ['ConvNet', 'LeNet', 'AlexNet', 'VGG11', 'ResNet18', 'MLP']
    """
    sizes = in_channels, image_size, num_classes
    return {
        "ConvNet": ConvNet(*sizes),
        "LeNet": LeNet(*sizes),
        "AlexNet": SmallAlexNet(*sizes),
        "VGG11": SmallVGG11(*sizes),
        "ResNet18": small_resnet18(*sizes),
        "MLP": MLP(*sizes),
    }
