"""Hugging Face datasets: memory-mapped Arrow files, as an iterable in shards, through a buffer of 1,000 rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import rows
from datasets import Array3D, Dataset, Features, Sequence, Value, load_from_disk
from rows import Batch
from torch.utils.data import DataLoader

NUMBERS = {**{f"x{i}": Value("float32") for i in range(12)}, **{f"n{i}": Value("int64") for i in range(4)}}
COLUMNS = {
    "raw": Features({"image": Array3D((3, 32, 32), "uint8"), "label": Value("int64")}),
    "jpeg": Features({"image": Value("binary"), "label": Value("int64")}),
    "tokens": Features({"tokens": Sequence(Value("int32"), length=1025)}),
    "tabular": Features({**NUMBERS, "label": Value("int64")}),
}


def write(kind: str, folder: Path) -> None:
    """As its documentation has it."""
    found = rows.columns(kind)
    Dataset.from_dict(found, features=COLUMNS[kind]).save_to_disk(folder, num_shards=8)


def read(found: dict[str, object], kind: str) -> Batch:
    """A batch of columns."""
    if kind == "jpeg":
        found = {**found, "image": np.stack([rows.decoded(file) for file in found["image"]])}
    return rows.batch_of_columns(kind, {name: np.asarray(column) for name, column in found.items()})


def batches(kind: str, folder: Path, workers: int) -> Iterator[Batch]:
    """Epoch after epoch; the last batch of each worker may be short."""
    data = load_from_disk(str(folder)).with_format("numpy").to_iterable_dataset(num_shards=8)
    epoch = 0
    while True:
        shuffled = data.shuffle(seed=epoch, buffer_size=1000).batch(rows.BATCH_ROWS[kind])
        yield from DataLoader(shuffled, batch_size=None, num_workers=workers, collate_fn=partial(read, kind=kind))
        epoch += 1
