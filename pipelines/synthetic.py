"""Made-up data, for tests and first steps: nothing to fetch, nothing on disk."""

from __future__ import annotations

from functools import partial

import numpy as np

from raymill.data.sources import ArraySource
from raymill.task import Field, Pipeline, Rows

FRAGMENT_ROWS = 50


def blobs(num_rows: int = 600, num_classes: int = 3, num_features: int = 8, num_spoiled: int = 0, seed: int = 0) -> Pipeline:
    """Rows around one centre per class, far enough apart for a small network to learn them.

    A batch has `features`, float32 [num_rows, num_features], and `label`, int64 [num_rows].

    Args:
        num_rows: training rows; a fifth as many, at least one, validate.
        num_spoiled: training rows, the first ones, whose features are NaN: to see what a run does about them.
        seed: of centres and rows.
    """
    sizes = {"train": num_rows, "validation": max(1, num_rows // 5)}
    return Pipeline(
        sources={
            split: ArraySource(
                f"blobs/{split}",
                partial(make_blobs, size, num_classes, num_features, num_spoiled if split == "train" else 0, seed, stream),
                FRAGMENT_ROWS,
            )
            for stream, (split, size) in enumerate(sizes.items())
        },
        schema={"features": Field("float32", (num_features,)), "label": Field("int64", classes=num_classes)},
        targets=["label"],
    )


def make_blobs(num_rows: int, num_classes: int, num_features: int, num_spoiled: int, seed: int, stream: int) -> Rows:
    """The rows; `stream` draws other rows around the same centres."""
    centres = np.random.default_rng(seed).normal(0, 3, (num_classes, num_features))
    generator = np.random.default_rng((seed, stream))
    labels = generator.integers(0, num_classes, num_rows)
    features = centres[labels] + generator.normal(size=(num_rows, num_features))
    features[:num_spoiled] = np.nan
    return {"features": features.astype(np.float32), "label": labels}
