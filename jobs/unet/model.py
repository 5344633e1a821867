"""U-Net (Ronneberger, Fischer, Brox, 2015): down to a small picture of many features, up again beside what was seen on the way.

Shapes: N pictures, C channels in, K classes.
"""

import torch
from torch import nn


def block(channels: int, made: int) -> nn.Sequential:
    """Two convolutions: [N, channels, H, W] to [N, made, H, W]."""
    layers: list[nn.Module] = []
    for taken in (channels, made):
        layers += [nn.Conv2d(taken, made, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Pictures [N, C, H, W], of sides that 8 divides, to scores [N, K, H, W]."""

    def __init__(self, channels: int, num_classes: int, width: int, depth: int = 3) -> None:
        """Build with random first weights."""
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList([block(taken, made) for taken, made in zip([channels, *widths], widths, strict=False)])
        self.shrink = nn.MaxPool2d(2)
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.grow = nn.ModuleList([nn.ConvTranspose2d(wide, made, kernel_size=2, stride=2) for wide, made in pairs])
        self.up = nn.ModuleList([block(2 * made, made) for _, made in pairs])
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        seen: list[torch.Tensor] = []
        features = image
        for level, layer in enumerate(self.down):
            features = layer(self.shrink(features) if level else features)
            seen.append(features)
        for grow, layer, beside in zip(self.grow, self.up, seen[-2::-1], strict=True):
            features = layer(torch.cat([beside, grow(features)], dim=1))
        scores: torch.Tensor = self.head(features)
        return scores
