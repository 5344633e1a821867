"""Tell nuclei from what is around them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from jobs.unet.model import UNet
from jobs.vision.draw import side_by_side
from raymill.task import Kept, Picture, Schema, Task, Total

NUM_CLASSES = 2


class Nuclei(Task):
    """Cross-entropy of each pixel and Dice of each picture (Milletari, Navab, Ahmadi, 2016)."""

    def __init__(self, schema: Schema, width: int = 16) -> None:
        """`width`: channels of the first level."""
        self.width = width

    def build(self) -> nn.Module:
        """The network with its first weights."""
        return UNet(1, NUM_CLASSES, self.width)

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """Both, in equal parts."""
        scores, mask = model(batch["image"]), batch["mask"]
        entropy = functional.cross_entropy(scores, mask)
        found, true = scores.softmax(dim=1)[:, 1].flatten(1), mask.flatten(1)
        dice = (2 * (found * true).sum(dim=1) + 1) / ((found + true).sum(dim=1) + 1)
        return {"loss": entropy + 1 - dice.mean(), "entropy": entropy.detach(), "dice": dice.mean().detach()}

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Total | Kept]:
        """Loss of each row; of all pixels, how many of each class were said to be of which."""
        scores, mask = model(batch["image"]), batch["mask"]
        pairs = torch.bincount((mask * NUM_CLASSES + scores.argmax(dim=1)).flatten(), minlength=NUM_CLASSES**2)
        return {
            "loss": functional.cross_entropy(scores, mask, reduction="none").mean(dim=(1, 2)),
            "pixels": Total(pairs.reshape(NUM_CLASSES, NUM_CLASSES)),
            "shown": Kept(torch.stack([batch["image"][:, 0], mask, scores.softmax(dim=1)[:, 1]], dim=1)),
        }

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, float | Picture]:
        """Intersection over union and Dice of the nuclei, over all pixels."""
        (_, false_alarm), (missed, hit) = totals["pixels"].double()
        return {
            "iou": hit / (hit + missed + false_alarm).clamp(min=1),
            "dice": 2 * hit / (2 * hit + missed + false_alarm).clamp(min=1),
            "nuclei": Picture(side_by_side(list(kept["shown"][0]), ["picture", "drawn by hand", "seen"])),
        }

    def predict(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """How likely each pixel is one of a nucleus."""
        return {"nucleus": model(batch["image"]).softmax(dim=1)[:, 1]}

    def inputs(self, batch: Any) -> tuple[torch.Tensor, ...]:
        """What the network takes."""
        return (batch["image"],)
