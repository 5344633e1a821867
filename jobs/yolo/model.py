"""A detector of one stage without anchors: each cell of a grid says whether a thing is there, of which class, and its sides.

After YOLO (Redmon et al., 2016), with the distances to four sides of FCOS (Tian et al., 2019).
Shapes: N pictures, C classes, H x W cells of 8 x 8 pixels.
"""

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

STRIDE = 8


class Residual(nn.Module):
    """Two convolutions whose result is added to what came in."""

    def __init__(self, channels: int) -> None:
        """Build with random first weights."""
        super().__init__()
        self.layers = nn.Sequential(*[Conv2dNormActivation(channels, channels, 3, activation_layer=nn.SiLU) for _ in range(2)])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, channels, H, W] to the same."""
        made: torch.Tensor = self.layers(features)
        return features + made


class Grid(nn.Module):
    """Pictures [N, 3, 8 H, 8 W] from 0 to 1 to [N, H * W, 4 + 1 + C]: distances in pixels, then scores."""

    def __init__(self, num_classes: int, width: int) -> None:
        """Build with random first weights. At first a thing is thought to be in one of a hundred cells (Lin et al., 2017)."""
        super().__init__()
        layers: list[nn.Module] = []
        for channels, made in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [Conv2dNormActivation(channels, made, 3, stride=2, activation_layer=nn.SiLU), Residual(made)]
        # Seen from farther away: what is around tells trees from bushes and shadows.
        around = Conv2dNormActivation(4 * width, 4 * width, 3, dilation=3, activation_layer=nn.SiLU)
        self.trunk = nn.Sequential(*layers, around, Residual(4 * width))
        self.head = nn.Conv2d(4 * width, 5 + num_classes, 1)
        nn.init.constant_(self.head.bias[4:5], -4.6)  # type: ignore[index]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        found = self.head(self.trunk(image)).flatten(2).transpose(1, 2)
        distances = nn.functional.softplus(found[..., :4]) * STRIDE
        return torch.cat([distances, found[..., 4:]], dim=2)


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
