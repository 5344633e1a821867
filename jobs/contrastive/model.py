"""An encoder and what is compared of it."""

import torch
from torch import nn
from torch.nn import functional

NUM_FEATURES = 128


class Encoder(nn.Module):
    """Pictures [N, 1, 28, 28] to features [N, 128]; `compared` puts these on a sphere of 64 axes (Chen et al., 2020)."""

    def __init__(self, width: int) -> None:
        """Build with random first weights."""
        super().__init__()
        layers: list[nn.Module] = []
        for channels, made in ((1, width), (width, 2 * width), (2 * width, NUM_FEATURES)):
            layers += [nn.Conv2d(channels, made, kernel_size=3, stride=2, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projection = nn.Sequential(nn.Linear(NUM_FEATURES, NUM_FEATURES), nn.ReLU(), nn.Linear(NUM_FEATURES, 64))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        features: torch.Tensor = self.layers(image)
        return features

    def compared(self, image: torch.Tensor) -> torch.Tensor:
        """See the class: [N, 64]."""
        return functional.normalize(self.projection(self(image)), dim=1)
