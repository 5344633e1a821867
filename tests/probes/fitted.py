"""A text classifier whose words, and a regressor beside it whose scale, are fitted on the training rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.data.sources import ArraySource
from raymill.task import Field, Pipeline, Rows, Schema, Task

LENGTH, UNKNOWN = 4, 0
CALLS = {"fit": 0}
WORDS = ["good", "bad", "fine", "poor", "warm", "cold"]

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "Adam", "lr": 0.05},
    "loop": {"epochs": 3, "global_batch_rows": 12, "seed": 4, "window_rows": 15},
}


def make_rows(count: int, seed: int) -> Rows:
    generator = np.random.default_rng(seed)
    words = generator.integers(0, len(WORDS), (count, LENGTH))
    price = (50 + 20 * generator.normal(size=count)).astype(np.float32)
    return {"text": [" ".join(WORDS[word] for word in row) for row in words], "price": price, "label": words[:, 0] % 2}


def fit(rows: Iterator[Rows]) -> dict[str, bytes]:
    """The words that there are, and the mean and deviation of prices."""
    CALLS["fit"] += 1
    words: set[str] = set()
    prices: list[float] = []
    for part in rows:
        words |= {word for text in part["text"] for word in text.split()}
        prices += np.asarray(part["price"]).tolist()
    scale = {"mean": float(np.mean(prices)), "deviation": float(np.std(prices))}
    return {"words": json.dumps(sorted(words)).encode(), "scale": json.dumps(scale).encode()}


def change(rows: Rows, split: str, generator: np.random.Generator, places: Mapping[str, int], scale: Mapping[str, float]) -> Rows:
    ids = [[places.get(word, UNKNOWN) for word in text.split()] for text in rows["text"]]
    price = (np.asarray(rows["price"]) - scale["mean"]) / scale["deviation"]
    return {"words": np.array(ids), "price": price.astype(np.float32), "label": np.asarray(rows["label"])}


def pipeline(fitted: Mapping[str, bytes]) -> Pipeline:
    words = json.loads(fitted.get("words", b"[]"))
    places = {word: place for place, word in enumerate(words, 1)}
    scale = json.loads(fitted.get("scale", b'{"mean": 0, "deviation": 1}'))
    sizes = {"train": (50, 1), "validation": (19, 2)}
    sources = {split: ArraySource(f"texts/{split}", partial(make_rows, *size), 7) for split, size in sizes.items()}
    schema: Schema = {"text": Field("text"), "price": Field("float32"), "label": Field("int64", classes=2)}
    return Pipeline(sources=sources, schema=schema, transform=partial(change, places=places, scale=scale), fit=fit)


class _Net(nn.Module):
    def __init__(self, num_words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_words + 1, 6)
        self.head = nn.Linear(6 * LENGTH + 1, 2)

    def forward(self, words: torch.Tensor, price: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(torch.cat([self.embedding(words).flatten(1), price[:, None]], dim=1))
        return scores


class Reads(Task):
    """Trains it; the size of its embedding is fitted too."""

    def __init__(self, schema: Schema, fitted: Mapping[str, bytes]) -> None:
        self.num_words = len(json.loads(fitted["words"]))

    def build(self) -> nn.Module:
        return _Net(self.num_words)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch["words"], batch["price"]), batch["label"])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        scores = model(batch["words"], batch["price"])
        return {"loss": functional.cross_entropy(scores, batch["label"], reduction="none")}

    def inputs(self, batch: Any) -> tuple[torch.Tensor, ...]:
        return batch["words"], batch["price"]
