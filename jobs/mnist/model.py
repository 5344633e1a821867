"""A small convolutional network for 28 x 28 grey images.

Shapes: N images, W channels of the first block, K classes.
"""

import torch
from torch import nn


class Cnn(nn.Module):
    """Two blocks of convolution, batch norm, ReLU and pooling, then a linear head."""

    def __init__(self, width: int, num_classes: int) -> None:
        """Build with random first weights."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),  # [N, W, 14, 14]
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),  # [N, 2W, 7, 7]
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.25), nn.Linear(2 * width * 7 * 7, num_classes))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images [N, 1, 28, 28] to scores [N, K]."""
        scores: torch.Tensor = self.head(self.features(image))
        return scores
