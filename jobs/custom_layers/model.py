"""Layers of our own: a function with a gradient of its own, a norm, a pooling with a learned exponent, a linear layer of cosines.

Shapes: N pictures, C channels, K classes.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Swish(torch.autograd.Function):
    """x * sigmoid(x) (Ramachandran, Zoph, Le, 2017), whose gradient is computed from x alone, so that nothing else is kept.

    Its gradient is differentiable itself.
    """

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        """Of any shape."""
        context.save_for_backward(x)
        made: torch.Tensor = x * x.sigmoid()
        return made

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """d/dx x s(x) = s(x) (1 + x (1 - s(x)))."""
        (x,) = context.saved_tensors
        s = x.sigmoid()
        gradient: torch.Tensor = gradients[0] * s * (1 + x * (1 - s))
        return gradient


def swish(x: torch.Tensor) -> torch.Tensor:
    """See `Swish`."""
    made: torch.Tensor = Swish.apply(x)
    return made


class ChannelNorm(nn.Module):
    """Each pixel's channels [N, C, H, W] divided by their root mean square, then scaled (RMSNorm: Zhang, Sennrich, 2019)."""

    def __init__(self, channels: int, epsilon: float = 1e-6) -> None:
        """A scale of 1 for each channel."""
        super().__init__()
        self.scale, self.epsilon = nn.Parameter(torch.ones(channels)), epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        size = (x.square().mean(dim=1, keepdim=True) + self.epsilon).sqrt()
        return x / size * self.scale[:, None, None]


class PowerPool(nn.Module):
    """(mean of x^p)^(1/p) over the picture, [N, C, H, W] to [N, C]; p is learned: 1 is the mean, much is the maximum.

    Radenović, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018.
    """

    def __init__(self, power: float = 3.0, least: float = 1e-3) -> None:
        """`least`: what smaller values count as."""
        super().__init__()
        self.power, self.least = nn.Parameter(torch.tensor(power)), least

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return x.clamp(min=self.least).pow(self.power).mean(dim=(2, 3)).pow(1 / self.power)


class Cosines(nn.Module):
    """The cosines between features [N, C] and a direction for each class, times a scale that is learned: [N, K]."""

    def __init__(self, channels: int, num_classes: int, scale: float = 10.0) -> None:
        """Random directions."""
        super().__init__()
        self.directions = nn.Parameter(torch.randn(num_classes, channels))
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.scale * functional.normalize(features, dim=1) @ functional.normalize(self.directions, dim=1).T


class Activation(nn.Module):
    """`swish` as a layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `Swish`."""
        return swish(x)


class Network(nn.Module):
    """Three convolutions with the layers above: pictures [N, 1, 28, 28] to scores [N, K]."""

    def __init__(self, width: int, num_classes: int) -> None:
        """Build with random first weights."""
        super().__init__()
        layers: list[nn.Module] = []
        for channels, made, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
            layers += [nn.Conv2d(channels, made, kernel_size=3, stride=stride, padding=1), ChannelNorm(made), Activation()]
        self.layers = nn.Sequential(*layers, PowerPool(), Cosines(4 * width, num_classes))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        scores: torch.Tensor = self.layers(image)
        return scores
