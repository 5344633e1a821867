"""A trunk that was trained on other pictures, and a new head."""

import torch
from torch import nn

from jobs.vision.lite0 import NUM_FEATURES, Lite0
from pipelines.pretrained import lite0_file


class Headed(nn.Module):
    """EfficientNet-Lite0, the mean of its features over the picture, a linear head."""

    def __init__(self, num_classes: int, *, pretrained: bool) -> None:
        """The trunk stays in eval mode, so that its batch norm keeps the statistics it was trained with."""
        super().__init__()
        self.trunk = (Lite0().load(lite0_file()) if pretrained else Lite0()).eval()
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(NUM_FEATURES, num_classes))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, S, S] from -1 to 1, to scores [N, K]."""
        scores: torch.Tensor = self.head(self.trunk(image).mean(dim=(2, 3)))
        return scores
