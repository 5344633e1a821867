"""A classifier with all that makes a resume hard: running statistics, dropout, random transforms, a small tail batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.data.sources import ArraySource
from raymill.task import Field, Pipeline, Rows, Schema, Task, Total

NUM_CLASSES = 3
GLOBAL_BATCH_ROWS = 24
TRAIN_ROWS = 4 * GLOBAL_BATCH_ROWS + 2
VALIDATION_ROWS = 31
STEPS_PER_EPOCH = 5

SCHEMA: Schema = {"image": Field("float32", (1, 4, 4)), "label": Field("int64", classes=NUM_CLASSES)}

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "SGD", "lr": 0.05, "momentum": 0.9, "max_grad_norm": 1.0},
    "schedule": {"kind": "CosineAnnealingLR", "warmup_steps": 4},
    "loop": {"epochs": 3, "global_batch_rows": GLOBAL_BATCH_ROWS, "gradient_accumulation_steps": 2, "seed": 5, "window_rows": 17},
    "checkpoint": {"metric": "validation/accuracy"},
}


def make_rows(count: int, seed: int) -> Rows:
    generator = np.random.default_rng(seed)
    label = generator.integers(0, NUM_CLASSES, count)
    image = generator.normal(size=(count, 1, 4, 4)) + label[:, None, None, None]
    return {"image": image.astype(np.float32), "label": label}


def jitter(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
    """Add noise to training images."""
    if split == "train":
        image = np.asarray(rows["image"])
        return {**rows, "image": (image + generator.normal(0, 0.1, image.shape)).astype(np.float32)}
    return rows


def pipeline(train_rows: int = TRAIN_ROWS, validation_rows: int = VALIDATION_ROWS, fragment_rows: int = 7) -> Pipeline:
    sources = {"train": ArraySource("mixed/train", partial(make_rows, train_rows, 1), fragment_rows)}
    if validation_rows:
        sources["validation"] = ArraySource("mixed/validation", partial(make_rows, validation_rows, 2), fragment_rows)
    return Pipeline(sources=sources, schema=SCHEMA, transform=jitter)


def pipeline_with_nan() -> Pipeline:
    """The same rows, one of which is not a number."""
    return Pipeline(sources={"train": ArraySource("mixed/nan", make_rows_with_nan, 7)}, schema=SCHEMA)


def make_rows_with_nan() -> Rows:
    rows = make_rows(TRAIN_ROWS, 1)
    np.asarray(rows["image"])[60] = np.nan
    return rows


class Mixed(Task):
    """A convolution with batch norm and dropout, then two heads of unequal size, so that DDP has several buckets."""

    def __init__(self, schema: Schema, norm: bool = True) -> None:
        self.norm = norm

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, kernel_size=3, padding=1),
            nn.BatchNorm2d(4) if self.norm else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2 if self.norm else 0.0),
            nn.Linear(64, 16),
            nn.Tanh(),
            nn.Linear(16, NUM_CLASSES),
        )

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch["image"]), batch["label"])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Total]:
        scores, label = model(batch["image"]), batch["label"]
        predicted = scores.argmax(dim=1)
        pairs = torch.bincount(label * NUM_CLASSES + predicted, minlength=NUM_CLASSES**2)
        return {
            "loss": functional.cross_entropy(scores, label, reduction="none"),
            "accuracy": (predicted == label).float(),
            "confusion": Total(pairs.reshape(NUM_CLASSES, NUM_CLASSES)),
        }

    def inputs(self, batch: Any) -> tuple[torch.Tensor, ...]:
        return (batch["image"],)


def plain(schema: Schema) -> Mixed:
    """The same without batch norm and dropout, whose gradient does not depend on how a batch is cut."""
    return Mixed(schema, norm=False)


class Loud(Mixed):
    """Its gradients are finite, and far too large for its learning rate."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return 1e4 * super().loss(model, batch)


def loud(schema: Schema) -> Loud:
    return Loud(schema, norm=False)
