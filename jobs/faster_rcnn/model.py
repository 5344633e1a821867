"""EfficientNet-Lite0 as torchvision's detectors take a network."""

from collections import OrderedDict

import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from jobs.vision.lite0 import PYRAMID, Lite0
from pipelines.pretrained import lite0_file


class Backbone(nn.Module):
    """Pictures [N, 3, height, width] from -1 to 1 to features by level: [N, out_channels, height / 8, width / 8] and smaller."""

    def __init__(self, *, pretrained: bool, out_channels: int = 128) -> None:
        """Trained batch norm stays as it is."""
        super().__init__()
        self.out_channels = out_channels
        self.trunk = Lite0().load(lite0_file()).eval() if pretrained else Lite0()
        self.pyramid = FeaturePyramidNetwork(list(PYRAMID), out_channels, LastLevelMaxPool())

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """See the class."""
        levels = self.trunk.pyramid(image)
        found: dict[str, torch.Tensor] = self.pyramid(OrderedDict((str(number), level) for number, level in enumerate(levels)))
        return found


def lite0_backbone(*, pretrained: bool) -> nn.Module:
    """For `FasterRCNN` and its kin: they ask for `out_channels`."""
    return Backbone(pretrained=pretrained)
