"""A small network learns from what a larger one, trained before, says of the rows.

Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.data.sources import ArraySource
from raymill.task import Field, Pipeline, Rows, Task

TEMPERATURE = 2.0

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "SGD", "lr": 0.2, "momentum": 0.9},
    "loop": {"epochs": 3, "global_batch_rows": 12, "seed": 3, "window_rows": 24},
    "checkpoint": {"metric": "validation/loss", "mode": "min"},
}


def make_rows(count: int, seed: int) -> Rows:
    """Points whose class is told by the sign of a sum."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(count, 6)).astype(np.float32)
    return {"point": points, "label": (points.sum(1) > 0).astype(np.int64)}


def pipeline() -> Pipeline:
    """The rows."""
    sources = {
        split: ArraySource(f"points/{split}", partial(make_rows, count, seed), 30)
        for split, count, seed in (("train", 200, 1), ("validation", 40, 2))
    }
    schema = {"point": Field("float32", (6,)), "label": Field("int64", classes=2)}
    return Pipeline(sources=sources, schema=schema, targets=["label"])


class Teaches(Task):
    """The larger network, with dropout: what it says must not hang on chance."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch["point"]), batch["label"])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        scores = model(batch["point"])
        return {
            "loss": functional.cross_entropy(scores, batch["label"], reduction="none"),
            "accuracy": (scores.argmax(1) == batch["label"]).float(),
        }

    def inputs(self, batch: Any) -> tuple[torch.Tensor, ...]:
        return (batch["point"],)


class Learns(Teaches):
    """The smaller one."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.teacher = inputs["teacher"].load_model()

    def build(self) -> nn.Module:
        return nn.Linear(6, 2)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        said = (self.teacher(batch["point"]) / TEMPERATURE).softmax(1)
        scores = (model(batch["point"]) / TEMPERATURE).log_softmax(1)
        return functional.kl_div(scores, said, reduction="batchmean") * TEMPERATURE**2
