"""EfficientNet-Lite0: EfficientNet-B0 without squeeze and excitation, and with ReLU6, so that it runs well anywhere.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019; Lite0: TensorFlow's, 2020.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

NUM_FEATURES = 1280

STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel size, stride of the first block, expansion, channels."""


LAST_BLOCKS, PYRAMID = (4, 10, 15), (40, 112, 320)
"""The last block before the picture is halved again, from an 8th of its sides on, and its channels."""


class Lite0(nn.Module):
    """Pictures [N, 3, height, width] from -1 to 1, of sides that 32 divides, to features [N, 1280, height / 32, width / 32]."""

    def __init__(self) -> None:
        """Build with random first weights; names are those of the published weights, without their underscores."""
        super().__init__()
        self.conv_stem, self.bn0 = _conv(3, 32, 3, stride=2), _norm(32)
        blocks, channels = [], 32
        for num_blocks, kernel, stride, expansion, made in STAGES:
            for number in range(num_blocks):
                blocks.append(Block(channels, made, kernel, stride if number == 0 else 1, expansion))
                channels = made
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = _conv(channels, NUM_FEATURES, 1), _norm(NUM_FEATURES)
        self.act = nn.ReLU6()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        features = self.act(self.bn0(self.conv_stem(image)))
        for block in self.blocks:
            features = block(features)
        found: torch.Tensor = self.act(self.bn1(self.conv_head(features)))
        return found

    def pyramid(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Features at an 8th, a 16th and a 32nd of the picture's sides, of `PYRAMID` channels."""
        found, features = [], self.act(self.bn0(self.conv_stem(image)))
        for number, block in enumerate(self.blocks):
            features = block(features)
            if number in LAST_BLOCKS:
                found.append(features)
        return found

    def load(self, path: Path) -> Lite0:
        """Take the published weights, all but those of the classes of ImageNet.

        Raises:
            FileNotFoundError: they were not fetched.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no weights; `raymill data get` of the job fetches them")
        published = {re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in load_file(path).items()}
        self.load_state_dict({name: tensor for name, tensor in published.items() if not name.startswith("fc.")})
        return self


class Block(nn.Module):
    """Widen, filter each channel by itself, narrow; what came in is added where the shapes allow."""

    def __init__(self, channels: int, made: int, kernel: int, stride: int, expansion: int) -> None:
        """Build with random first weights."""
        super().__init__()
        wide = channels * expansion
        if expansion != 1:
            self.expand_conv, self.bn0 = _conv(channels, wide, 1), _norm(wide)
        self.depthwise_conv, self.bn1 = _conv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self.project_conv, self.bn2 = _conv(wide, made, 1), _norm(made)
        self.act = nn.ReLU6()
        self.expands, self.adds = expansion != 1, stride == 1 and channels == made

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features [N, channels, height, width] to [N, made, height / stride, width / stride]."""
        wide = self.act(self.bn0(self.expand_conv(features))) if self.expands else features
        made: torch.Tensor = self.bn2(self.project_conv(self.act(self.bn1(self.depthwise_conv(wide)))))
        return made + features if self.adds else made


class SameConv2d(nn.Conv2d):
    """Padded as TensorFlow pads pictures of even sides: at stride 2, right and below get more."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """As of Conv2d."""
        total = self.kernel_size[0] - self.stride[0]
        if total > 0:
            before = total // 2
            features = nn.functional.pad(features, (before, total - before, before, total - before))
        return super().forward(features)


def _conv(channels: int, made: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return SameConv2d(channels, made, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
