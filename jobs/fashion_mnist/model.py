"""A convolutional network for grey pictures of 28 x 28 pixels.

Shapes: N pictures, W channels of the first block, K classes.
"""

import torch
from torch import nn


def block(channels: int, made: int) -> nn.Sequential:
    """Two convolutions with batch norm and ReLU, then pooling: [N, channels, S, S] to [N, made, S / 2, S / 2]."""
    layers: list[nn.Module] = []
    for taken in (channels, made):
        layers += [nn.Conv2d(taken, made, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


class Cnn(nn.Module):
    """Two blocks, then two linear layers."""

    def __init__(self, width: int, num_classes: int) -> None:
        """Build with random first weights."""
        super().__init__()
        self.features = nn.Sequential(block(1, width), block(width, 2 * width))  # [N, 2W, 7, 7]
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(2 * width * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, num_classes)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 1, 28, 28] to scores [N, K]."""
        scores: torch.Tensor = self.head(self.features(image))
        return scores
