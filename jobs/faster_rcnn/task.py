"""Find trees on pictures from above."""

from typing import Any

import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from jobs.vision.detect import Detector
from raymill.task import Schema


class TwoStages(Detector):
    """Faster R-CNN (Ren et al., 2015) with a MobileNetV3 and a feature pyramid, as torchvision builds it."""

    def __init__(self, schema: Schema, side: int = 512) -> None:
        """`side`: pixels that the shorter side of a picture is scaled to."""
        self.side = side

    def build(self) -> nn.Module:
        """The network with random first weights; class 0 is the background."""
        # Trees are small: of 15 to 60 pixels, and the pyramid's three levels come with anchors for far larger things.
        anchors = AnchorGenerator(((16, 32, 64),) * 3, ((0.8, 1.25),) * 3)
        model: nn.Module = fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None,
            weights_backbone=None,
            trainable_backbone_layers=6,
            num_classes=2,
            min_size=self.side,
            max_size=2 * self.side,
            rpn_anchor_generator=anchors,
            rpn_pre_nms_top_n_test=500,
            rpn_post_nms_top_n_test=300,
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
