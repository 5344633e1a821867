"""Find trees on pictures from above."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone

from jobs.faster_rcnn.model import lite0_backbone
from jobs.vision.detect import Detector
from raymill.task import Schema

ANCHORS = ((16, 24), (32, 48), (64, 96), (128, 192))
"""Of the levels of the pyramid: sides of the squares that boxes are measured from, in pixels of the scaled picture."""


class TwoStages(Detector):
    """Faster R-CNN (Ren et al., 2015) of torchvision, on a mobile network with a feature pyramid."""

    def __init__(
        self,
        schema: Schema,
        classes: Sequence[str] = ("Tree",),
        backbone: str = "lite0",
        pretrained: bool = True,
        side: int = 448,
    ) -> None:
        """Choose the network.

        Args:
            schema: of the pipeline.
            classes: of the pipeline's labels.
            backbone: lite0; or one of torchvision's mobile networks, such as mobilenet_v3_large, which begins untrained.
            pretrained: begin with the weights of EfficientNet-Lite0 that were trained on ImageNet.
            side: pixels that the shorter side of a picture is scaled to.
        """
        self.num_classes, self.backbone, self.pretrained, self.side = len(classes), backbone, pretrained, side

    def build(self) -> nn.Module:
        """The network with its first weights; class 0 is the background."""
        levels = len(ANCHORS)
        if self.backbone == "lite0":
            backbone = lite0_backbone(pretrained=self.pretrained)
        else:
            backbone = mobilenet_backbone(
                backbone_name=self.backbone, weights=None, fpn=True, trainable_layers=6, norm_layer=nn.BatchNorm2d
            )
            levels = 3
        model: nn.Module = FasterRCNN(
            backbone,
            num_classes=self.num_classes + 1,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            min_size=self.side,
            max_size=2 * self.side,
            rpn_anchor_generator=AnchorGenerator(ANCHORS[-levels:], ((1.0,),) * levels),
            rpn_pre_nms_top_n_train=400,
            rpn_post_nms_top_n_train=300,
            rpn_pre_nms_top_n_test=400,
            rpn_post_nms_top_n_test=300,
            box_batch_size_per_image=96,
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
