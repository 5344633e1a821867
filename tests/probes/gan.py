"""A generative adversarial network on points of a line: two networks, two objectives, two optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.data.sources import ArraySource
from raymill.task import Field, Objective, Pipeline, Rows, Schema, Task

NOISE = 2
CENTRE = 3.0

VALUES: dict[str, Any] = {
    "optimizer": {
        "discriminator": {"kind": "SGD", "lr": 0.02, "momentum": 0.5},
        "generator": {"kind": "Adam", "lr": 0.02, "betas": [0.5, 0.9]},
    },
    "loop": {"epochs": 4, "global_batch_rows": 32, "seed": 1},
}


def make_rows(count: int, seed: int) -> Rows:
    return {"point": np.random.default_rng(seed).normal(CENTRE, 0.5, (count, 1)).astype(np.float32)}


def pipeline() -> Pipeline:
    sources = {
        "train": ArraySource("points/train", partial(make_rows, 250, 1), 40),
        "validation": ArraySource("points/validation", partial(make_rows, 64, 2), 40),
    }
    return Pipeline(sources=sources, schema={"point": Field("float32", (1,))})


class Gan(nn.Module):
    """Noise to points, and points to how real they look."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(NOISE, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.discriminator = nn.Sequential(nn.Linear(1, 16), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(16, 1))


class Points(Task):
    """The discriminator learns to tell points apart, then the generator learns to mislead it."""

    def __init__(self, schema: Schema) -> None:
        pass

    def build(self) -> nn.Module:
        return Gan()

    def objectives(self) -> Sequence[Objective]:
        return [
            Objective("discriminator", self.tell_apart, ("discriminator",)),
            Objective("generator", self.mislead, ("generator",)),
        ]

    def tell_apart(self, model: nn.Module, batch: Any) -> torch.Tensor:
        real = batch["point"]
        made = model.generator(torch.randn(len(real), NOISE))  # type: ignore[operator]
        scores = model.discriminator(torch.cat([real, made]))  # type: ignore[operator]
        truth = torch.cat([torch.ones_like(real), torch.zeros_like(made)])
        return functional.binary_cross_entropy_with_logits(scores, truth)

    def mislead(self, model: nn.Module, batch: Any) -> torch.Tensor:
        made = model.generator(torch.randn(len(batch["point"]), NOISE))  # type: ignore[operator]
        scores = model.discriminator(made)  # type: ignore[operator]
        return functional.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        made = model.generator(torch.randn(len(batch["point"]), NOISE))  # type: ignore[operator]
        return {"distance": (made[:, 0] - CENTRE).abs()}
