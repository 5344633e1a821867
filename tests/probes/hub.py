"""A data set of Hugging Face, unchanged, whose own transform draws at random: words of texts, some of them masked."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from probes import reviews
from raymill.data.sources import MapStyleSource
from raymill.task import Field, Pipeline


def mask(items: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Its transform: a tenth of the words behind the first, with numpy's own generator."""
    words = [np.array(one) for one in items["words"]]
    for one in words:
        one[1:][np.random.random(len(one) - 1) < 0.1] = 0
    ones = [np.ones(reviews.LENGTH, np.int64)] * len(words)
    return {"input_ids": words, "attention_mask": ones, "labels": items["label"]}


def make(count: int, seed: int) -> Any:
    """The data set."""
    words = np.random.default_rng(seed).integers(1, reviews.NUM_WORDS, (count, reviews.LENGTH))
    rows = {"words": words.tolist(), "label": (words[:, 0] >= reviews.NUM_WORDS // 2).astype(int).tolist()}
    return datasets.Dataset.from_dict(rows).with_transform(mask)


def train() -> Any:
    return make(50, 1)


def validation() -> Any:
    return make(19, 2)


def pipeline() -> Pipeline:
    """The rows."""
    sources = {
        "train": MapStyleSource("hub/train", train, reviews.columns, 7),
        "validation": MapStyleSource("hub/validation", validation, reviews.columns, 7),
    }
    words = Field("int64", (reviews.LENGTH,))
    return Pipeline(sources=sources, schema={"input_ids": words, "attention_mask": words, "labels": Field("int64", classes=2)})
