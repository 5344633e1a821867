"""Where things are on a picture: what all detectors share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchmetrics.detection.mean_ap import MeanAveragePrecision

from jobs.vision.draw import curve, with_boxes
from raymill.task import Kept, Picture, Task


class Detector(Task):
    """Measures boxes by their average precision. Give it `build`, `loss` and `detect`."""

    def detect(self, model: nn.Module, batch: Any) -> list[torch.Tensor]:
        """For each picture of a batch, boxes [num_boxes, 6]: left, top, right, bottom, score, label; the surest first."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Kept]:
        """What is seen and what is there, of each row."""
        true = [torch.cat([b, n[:, None].float()], dim=1) for b, n in zip(batch["boxes"], batch["labels"], strict=True)]
        return {"seen": Kept(self.detect(model, batch)), "true": Kept(true), "image": Kept(list(batch["image"]))}

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, float | Picture]:
        """Mean average precision at an overlap of a half, as COCO defines it; the largest recall; a curve and a picture."""
        metric = MeanAveragePrecision(iou_thresholds=[0.5], max_detection_thresholds=[1, 10, 300], extended_summary=True)
        metric.warn_on_many_detections = False
        metric.update(
            [{"boxes": one[:, :4], "scores": one[:, 4], "labels": one[:, 5].long()} for one in kept["seen"]],
            [{"boxes": one[:, :4], "labels": one[:, 4].long()} for one in kept["true"]],
        )
        found = metric.compute()
        precision = found["precision"][0, :, 0, 0, -1].clamp(min=0)
        recall = torch.linspace(0, 1, len(precision))
        shown = max(range(len(kept["true"])), key=lambda row: len(kept["true"][row]))
        return {
            "map50": found["map_50"],
            "recall": found["mar_300"],
            "precision over recall": Picture(curve(recall, precision, "recall", "precision")),
            "boxes": Picture(with_boxes(kept["image"][shown], kept["true"][shown], likely(kept["seen"][shown]))),
        }

    def predict(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """The boxes of each picture."""
        return {"boxes": self.detect(model, batch)}


def likely(boxes: torch.Tensor, least_score: float = 0.3) -> torch.Tensor:
    """Those that are worth showing."""
    return boxes[boxes[:, 4] >= least_score]
