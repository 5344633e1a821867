"""Segment noisy images: mean intersection over union from a table that is summed, and a picture from the model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.data.sources import ArraySource
from raymill.task import Field, Now, Picture, Pipeline, Rows, Schema, Task, Total

NUM_CLASSES, SIZE = 3, 8

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "Adam", "lr": 0.02},
    "loop": {"steps": 13, "global_batch_rows": 12, "seed": 6},
    "evaluate": [
        {"split": "validation", "every_steps": 3, "rows": 11},
        {"split": "night", "every_epochs": 1},
        {"split": "test"},
    ],
    "checkpoint": {"metric": "validation/iou"},
}
"""Of two epochs of seven steps, the last is cut short by one."""


def make_rows(count: int, seed: int, noise: float) -> Rows:
    generator = np.random.default_rng(seed)
    mask = np.kron(generator.integers(0, NUM_CLASSES, (count, 2, 2)), np.ones((SIZE // 2, SIZE // 2), np.int64))
    image = mask[:, None] + generator.normal(0, noise, (count, 1, SIZE, SIZE))
    return {"image": image.astype(np.float32), "mask": mask}


def pipeline() -> Pipeline:
    sizes = {"train": (80, 1, 0.3), "validation": (23, 2, 0.3), "night": (9, 3, 0.6), "test": (17, 4, 0.3)}
    sources = {split: ArraySource(f"masks/{split}", partial(make_rows, *size), 7) for split, size in sizes.items()}
    schema: Schema = {"image": Field("float32", (1, SIZE, SIZE)), "mask": Field("int64", (SIZE, SIZE), classes=NUM_CLASSES)}
    return Pipeline(sources=sources, schema=schema)


class Masks(Task):
    """A class for each pixel."""

    def __init__(self, schema: Schema) -> None:
        pass

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, NUM_CLASSES, 3, padding=1))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch["image"]), batch["mask"])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Total]:
        scores, mask = model(batch["image"]), batch["mask"]
        pairs = torch.bincount((mask * NUM_CLASSES + scores.argmax(dim=1)).flatten(), minlength=NUM_CLASSES**2)
        return {
            "loss": functional.cross_entropy(scores, mask, reduction="none").mean(dim=(1, 2)),
            "pixels": Total(pairs.reshape(NUM_CLASSES, NUM_CLASSES)),
        }

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, float | Picture]:
        pixels = totals["pixels"]
        overlap = pixels.diagonal() / (pixels.sum(0) + pixels.sum(1) - pixels.diagonal()).clamp(min=1)
        return {"iou": overlap.mean(), "table": Picture(pixels / pixels.max())}

    def pictures(self, model: nn.Module, now: Now) -> Mapping[str, Picture]:
        noise = torch.randn(1, 1, SIZE, SIZE)
        return {"of noise": Picture(model(noise)[0].softmax(dim=0))}
