"""Find trees on pictures from above."""

from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone

from jobs.vision.detect import Detector
from raymill.task import Schema

ANCHORS = (16, 32, 48, 64, 96)
"""Sides of the squares that boxes are measured from, in pixels of the scaled picture."""


class TwoStages(Detector):
    """Faster R-CNN (Ren et al., 2015) with a MobileNetV3 and a feature pyramid, as torchvision builds it."""

    def __init__(self, schema: Schema, side: int = 512) -> None:
        """`side`: pixels that the shorter side of a picture is scaled to."""
        self.side = side

    def build(self) -> nn.Module:
        """The network with random first weights; class 0 is the background."""
        backbone = mobilenet_backbone(
            backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=6, norm_layer=nn.BatchNorm2d
        )
        # Trees are small, and the pyramid's levels come with anchors for larger things in torchvision's own function.
        anchors = AnchorGenerator((ANCHORS,) * 3, ((1.0,),) * 3)
        model: nn.Module = FasterRCNN(
            backbone,
            num_classes=2,
            min_size=self.side,
            max_size=2 * self.side,
            rpn_anchor_generator=anchors,
            rpn_pre_nms_top_n_train=600,
            rpn_post_nms_top_n_train=300,
            rpn_pre_nms_top_n_test=500,
            rpn_post_nms_top_n_test=300,
            box_batch_size_per_image=128,
            box_detections_per_img=300,
        )
        return model

    def loss(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """The sum of its four losses, which are logged."""
        targets = [{"boxes": b, "labels": n + 1} for b, n in zip(batch["boxes"], batch["labels"], strict=True)]
        parts: dict[str, torch.Tensor] = model([image / 255 for image in batch["image"]], targets)
        return {"loss": torch.stack(list(parts.values())).sum(), **{name: part.detach() for name, part in parts.items()}}

    def detect(self, model: nn.Module, batch: Any) -> list[torch.Tensor]:
        """As `Detector` says."""
        return [
            torch.cat([found["boxes"], found["scores"][:, None], found["labels"][:, None] - 1], dim=1)
            for found in model([image / 255 for image in batch["image"]])
        ]
