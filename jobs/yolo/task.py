"""Find trees on pictures from above, in one stage."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import batched_nms, complete_box_iou_loss, sigmoid_focal_loss

from jobs.vision.detect import Detector
from jobs.yolo.model import COARSEST, Grid, boxes_of, middles, owners
from raymill.task import Schema

MOST_BOXES = 300


class OneStage(Detector):
    """A grid of cells: focal loss on things, CIoU (Zheng et al., 2020) on boxes, cross-entropy on classes."""

    def __init__(self, schema: Schema, classes: Sequence[str] = ("Tree",), width: int = 64, pretrained: bool = True) -> None:
        """`classes`: of the pipeline's labels; `width`: channels of the head; `pretrained`: begin with a trunk that was."""
        self.num_classes, self.width, self.pretrained = len(classes), width, pretrained

    def build(self) -> nn.Module:
        """The network with its first weights."""
        return Grid(self.num_classes, self.width, pretrained=self.pretrained)

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """A mean over pictures, so that one of many trees weighs no more."""
        found = model(batch["image"] / 255)
        at = middles(*batch["image"].shape[-2:])
        each = [self._losses(*one, at) for one in zip(found, batch["boxes"], batch["labels"], strict=True)]
        thing, box, kind = torch.stack(each).mean(dim=0)
        return {"loss": thing + 2 * box + kind, "thing": thing.detach(), "box": box.detach(), "class": kind.detach()}

    @staticmethod
    def _losses(found: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Of one picture: thing, box, class."""
        owner = owners(at, boxes)
        own, num = owner >= 0, (owner >= 0).sum().clamp(min=1)
        thing = sigmoid_focal_loss(found[:, 4], own.float(), alpha=0.25, reduction="sum") / num
        true = boxes[owner[own]]
        box = complete_box_iou_loss(boxes_of(found[own, :4], at[own]), true, reduction="sum") / num
        kind = functional.cross_entropy(found[own, 5:], labels[owner[own]], reduction="sum") / num
        return torch.stack([thing, box, kind])

    def detect(self, model: nn.Module, batch: Any) -> list[torch.Tensor]:
        """As `Detector` says; sides that no cell ends at are filled up with black."""
        seen = []
        for image in batch["image"]:
            height, width = image.shape[-2:]
            padded = functional.pad(image[None] / 255, (0, -width % COARSEST, 0, -height % COARSEST))
            [found] = model(padded)
            boxes = boxes_of(found[:, :4], middles(*padded.shape[-2:]))
            likely, label = found[:, 5:].softmax(dim=1).max(dim=1)
            score = found[:, 4].sigmoid() * likely
            kept = batched_nms(boxes, score, label, 0.4)[:MOST_BOXES]
            limits = torch.tensor([width, height, width, height])
            seen.append(torch.cat([boxes[kept].clamp(min=0).minimum(limits), score[kept, None], label[kept, None]], dim=1))
        return seen
