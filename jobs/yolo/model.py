"""A detector of one stage without anchors: each cell of a grid says whether a thing is there, of which class, and its sides.

After YOLO (Redmon et al., 2016), with the distances to four sides of FCOS (Tian et al., 2019).
Shapes: N pictures, C classes, H x W cells of 8 x 8 pixels.
"""

import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import Conv2dNormActivation

from jobs.vision.lite0 import PYRAMID, Lite0
from pipelines.pretrained import lite0_file

STRIDE, COARSEST = 8, 32
"""Pixels of a side of a cell, and what a picture's sides are to be divisible by."""


class Grid(nn.Module):
    """Pictures [N, 3, 8 H, 8 W] from 0 to 1 to [N, H * W, 4 + 1 + C]: distances in pixels, then scores.

    The sides of a picture are to be divisible by 32.
    """

    def __init__(self, num_classes: int, width: int, *, pretrained: bool) -> None:
        """Build; at first a thing is thought to be in one of a hundred cells (Lin et al., 2017).

        Args:
            num_classes: C.
            width: channels that the features of all sizes are brought to.
            pretrained: begin with a trunk that was trained on ImageNet, whose batch norm stays as it is.
        """
        super().__init__()
        self.trunk = Lite0().load(lite0_file()).eval() if pretrained else Lite0()
        # Features seen from farther away are added to those of an 8th of the picture's sides (Lin et al., 2017).
        self.lateral = nn.ModuleList([nn.Conv2d(channels, width, 1) for channels in PYRAMID])
        self.head = nn.Sequential(*[Conv2dNormActivation(width, width, 3, activation_layer=nn.SiLU) for _ in range(2)])
        self.said = nn.Conv2d(width, 5 + num_classes, 1)
        nn.init.constant_(self.said.bias[4:5], -4.6)  # type: ignore[index]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        seen = [layer(features) for layer, features in zip(self.lateral, self.trunk.pyramid(image * 2 - 1), strict=True)]
        fused = seen[-1]
        for finer in reversed(seen[:-1]):
            fused = finer + functional.interpolate(fused, size=finer.shape[-2:], mode="nearest")
        found = self.said(self.head(fused)).flatten(2).transpose(1, 2)
        return torch.cat([functional.softplus(found[..., :4]) * STRIDE, found[..., 4:]], dim=2)


def middles(height: int, width: int) -> torch.Tensor:
    """The middles of the cells of a picture, in pixels: [H * W, 2] as across, down."""
    down, across = torch.meshgrid(torch.arange(height // STRIDE), torch.arange(width // STRIDE), indexing="ij")
    return (torch.stack([across, down], dim=2).reshape(-1, 2) + 0.5) * STRIDE


def boxes_of(distances: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Distances [..., 4] to left, top, right and bottom from middles [..., 2], to boxes [..., 4]."""
    return torch.cat([at - distances[..., :2], at + distances[..., 2:]], dim=-1)


def owners(at: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Which box each cell is to find: [H * W], -1 for none.

    A cell is to find the smallest box in whose middle part (1.5 cells around its middle) and inside of which it lies.
    """
    if not len(boxes):
        return torch.full((len(at),), -1)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = (at[:, None] - middle).abs().amax(dim=2) <= 1.5 * STRIDE
    inside = ((at[:, None] > boxes[:, :2]) & (at[:, None] < boxes[:, 2:])).all(dim=2)
    # The cell nearest to a middle has it in any case: a box may be smaller than a cell.
    nearest = (at[:, None] - middle).norm(dim=2)
    fits = (near & inside) | (nearest == nearest.min(dim=0).values)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).expand(len(at), -1).masked_fill(~fits, torch.inf)
    smallest, box = areas.min(dim=1)
    return torch.where(smallest.isinf(), -1, box)
