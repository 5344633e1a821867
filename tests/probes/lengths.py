"""Texts of different lengths, of which like ones meet in a batch; the transform drops words at random, a few rows at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from probes import served
from raymill.task import Pipeline, Rows

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "SGD", "lr": 0.1, "momentum": 0.9},
    "loop": {"epochs": 2, "global_batch_rows": 12, "seed": 4, "window_rows": 60},
}

CHUNK_ROWS = 7


def num_words(rows: Rows) -> list[int]:
    """Of each row."""
    return [len(text.split()) for text in rows["text"]]


def drop_words(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
    """A tenth of the words of each training row, but not its first one."""
    if split != "train":
        return rows
    kept = [[word for at, word in enumerate(text.split()) if not at or generator.random() > 0.1] for text in rows["text"]]
    return {**rows, "text": [" ".join(words) for words in kept]}


def pipeline() -> Pipeline:
    """The rows."""
    return replace(served.texts(), transform=drop_words, length=num_words)
