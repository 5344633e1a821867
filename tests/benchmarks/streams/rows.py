"""The rows that every way streams, and what becomes of a few of them in a batch.

Four kinds, of which a row is a dict:

* raw: `image` uint8 [3, 32, 32] and `label`; a batch has the images as float32 in 0..1;
* jpeg: `image`, the bytes of a file of 224 x 224 pixels, and `label`; a batch has uint8 [num_rows, 224, 224, 3];
* tokens: `tokens` int32 [1025]; a batch has them as they are;
* tabular: `x0` to `x11` float32, `n0` to `n3` int64, and `label`; a batch has a tensor of each column. Ways that keep rows as
  records have `numbers` float32 [12] and `ids` int64 [4] in place of them.

`label` (of tokens: the first one) is the row's number, by which the contest sees that each row came.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

NUM_ROWS = {"raw": 60_000, "jpeg": 3_000, "tokens": 20_000, "tabular": 400_000}
BATCH_ROWS = {"raw": 128, "jpeg": 32, "tokens": 16, "tabular": 2048}

RAY = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False, "object_store_memory": 2 * 2**30}
"""How Ray starts, for both that run on it; its object store as large as raymill's plan makes it on a machine of 24 GB."""

Row = Mapping[str, Any]
Batch = Mapping[str, torch.Tensor]


def columns(kind: str) -> dict[str, Any]:
    """All rows of a kind by column, the same each time; `image` of jpeg is a list of bytes."""
    count = NUM_ROWS[kind]
    generator = np.random.Generator(np.random.Philox(key=7))
    number = np.arange(count, dtype=np.int64)
    if kind == "raw":
        return {"image": generator.integers(0, 256, (count, 3, 32, 32), np.uint8), "label": number}
    if kind == "tokens":
        tokens = generator.integers(0, 50_000, (count, 1025), np.int32)
        tokens[:, 0] = number
        return {"tokens": tokens}
    if kind == "tabular":
        floats = {f"x{i}": generator.normal(size=count).astype(np.float32) for i in range(12)}
        return {**floats, **{f"n{i}": generator.integers(0, 1000, count) for i in range(4)}, "label": number}
    return {"image": [picture(generator) for _ in range(count)], "label": number}


def picture(generator: np.random.Generator) -> bytes:
    """A JPEG file of soft patches under some grain, about as hard to decode as a photograph (20 kB)."""
    from PIL import Image

    soft = Image.fromarray(generator.integers(0, 256, (14, 14, 3), np.uint8)).resize((224, 224), Image.Resampling.BICUBIC)
    grain = np.asarray(soft, np.int16) + generator.integers(-12, 13, (224, 224, 3), np.int16)
    file = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def records(kind: str) -> Iterable[dict[str, Any]]:
    """The same, row by row."""
    found = columns(kind)
    if kind == "tabular":
        numbers = np.stack([found[f"x{i}"] for i in range(12)], axis=1)
        found = {"numbers": numbers, "ids": np.stack([found[f"n{i}"] for i in range(4)], axis=1), "label": found["label"]}
    names = list(found)
    for values in zip(*found.values(), strict=True):
        yield dict(zip(names, values, strict=True))


def decoded(file: bytes) -> np.ndarray:
    """The pixels of a JPEG file, uint8 [224, 224, 3]; every way uses Pillow."""
    from PIL import Image

    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def batch_of_records(kind: str, rows: Sequence[Row]) -> Batch:
    """A batch of rows that came one by one, undecoded."""
    names = rows[0].keys()
    stacked = {
        name: [decoded(row[name]) for row in rows] if kind == "jpeg" and name == "image" else [row[name] for row in rows]
        for name in names
    }
    return batch_of_columns(kind, {name: np.stack(values) for name, values in stacked.items()})


def batch_of_columns(kind: str, found: Mapping[str, np.ndarray]) -> Batch:
    """A batch of columns, with pictures decoded."""
    batch = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in found.items()}
    if kind == "raw":
        batch["image"] = batch["image"].float().div_(255)
    return batch


def numbers_of(kind: str, batch: Batch) -> torch.Tensor:
    """The number of each row of a batch, int64 [num_rows]."""
    return batch["tokens"][:, 0].long() if kind == "tokens" else batch["label"].long()


def write_pictures(folder: Path) -> None:
    """The rows of jpeg as files, ten classes with a folder each; a name is the row's number."""
    for row in records("jpeg"):
        file = folder / str(row["label"] % 10) / f"{row['label']:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"])
