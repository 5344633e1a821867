"""A masked language model: masks are drawn in `collate`, words dropped in the source, noise added by the transform.

None of it is handed a generator: it draws from Python's, NumPy's and torch's own, as code written for other loops does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.data.sources import MapStyleSource
from raymill.task import Field, Fragment, Pipeline, Rows, Schema, Task

NUM_WORDS, LENGTH, MASK = 7, 6, 7

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "Adam", "lr": 0.02},
    "loop": {"epochs": 3, "global_batch_rows": 12, "window_rows": 10, "seed": 4},
}


class Augmented:
    """Sentences that count upwards, each changed at random whenever it is read, as torchvision's transforms do."""

    def __init__(self, count: int) -> None:
        self.starts = np.random.permutation(count)  # the set itself is drawn too

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> np.ndarray:
        words = (int(self.starts[number]) + np.arange(LENGTH)) % NUM_WORDS
        words[random.randrange(LENGTH)] = np.random.randint(NUM_WORDS)
        return words + int(torch.randint(0, 2, ())) * 0


@dataclass(frozen=True)
class Sentences:
    """A map-style data set, unchanged."""

    count: int

    @property
    def source(self) -> MapStyleSource:
        return MapStyleSource("sentences", self.make, lambda words: {"words": words}, 5)

    def make(self) -> Augmented:
        return Augmented(self.count)

    def fragments(self) -> Sequence[Fragment]:
        return self.source.fragments()

    def read(self, fragment: Fragment) -> Rows:
        return self.source.read(fragment)


def noise(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
    """A weight for each sentence, drawn from torch's and Python's generators."""
    count = len(rows["words"])
    return {**rows, "weight": torch.rand(count).numpy() + np.float32(random.random())}


def mask(rows: Rows) -> dict[str, torch.Tensor]:
    """Hide a third of the words."""
    words = torch.tensor(np.asarray(rows["words"]).copy())
    hidden = torch.rand(words.shape) < 1 / 3
    weight = torch.tensor(np.asarray(rows["weight"]).copy())
    return {"words": words, "hidden": hidden, "seen": words.masked_fill(hidden, MASK), "weight": weight}


def pipeline() -> Pipeline:
    sources = {"train": Sentences(46), "validation": Sentences(17)}
    schema: Schema = {"words": Field("int64", (LENGTH,), classes=NUM_WORDS)}
    return Pipeline(sources=sources, schema=schema, transform=noise, collate=mask)


class FillIn(Task):
    """Guess the hidden words from those around them."""

    def __init__(self, schema: Schema) -> None:
        pass

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(MASK + 1, 6), nn.Flatten(), nn.Linear(6 * LENGTH, NUM_WORDS * LENGTH))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return self._per_row(model, batch).mean()

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": self._per_row(model, batch)}

    def _per_row(self, model: nn.Module, batch: Any) -> torch.Tensor:
        scores = model(batch["seen"]).view(-1, NUM_WORDS, LENGTH)
        losses = functional.cross_entropy(scores, batch["words"], reduction="none")
        return (losses * batch["hidden"]).sum(dim=1) * batch["weight"]
