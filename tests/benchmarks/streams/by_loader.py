"""torch's DataLoader over a map-style data set: memory-mapped arrays, or picture files.

Tuned: the data set is asked for the rows of a batch at once, and gives the batch; workers outlive an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import rows
import torch
from rows import Batch
from torch.utils.data import DataLoader, Dataset


def write(kind: str, folder: Path) -> None:
    """Each column as an .npy file, or the pictures as files."""
    if kind == "jpeg":
        return rows.write_pictures(folder)
    for name, column in rows.columns(kind).items():
        np.save(folder / f"{name}.npy", column)
    return None


class Mapped(Dataset[Batch]):
    """Batches of rows by their numbers."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.files = sorted(folder.rglob("*.jpg"), key=lambda file: file.name)
        self.columns = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}

    def __len__(self) -> int:
        return len(self.files) or len(next(iter(self.columns.values())))

    def __getitems__(self, index: Sequence[int]) -> Batch:
        if self.kind != "jpeg":
            return rows.batch_of_columns(self.kind, {name: column[index] for name, column in self.columns.items()})
        found = [{"image": self.files[i].read_bytes(), "label": np.int64(i)} for i in index]
        return rows.batch_of_records(self.kind, found)


def as_it_is(batch: Batch) -> Batch:
    """The collate function of a data set that gives batches."""
    return batch


def batches(kind: str, folder: Path, workers: int) -> Iterator[Batch]:
    """Epoch after epoch."""
    loader = DataLoader(
        Mapped(kind, folder),
        rows.BATCH_ROWS[kind],
        shuffle=True,
        num_workers=workers,
        collate_fn=as_it_is,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator().manual_seed(0),
    )
    while True:
        yield from loader
