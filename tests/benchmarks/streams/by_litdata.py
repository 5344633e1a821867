"""LitData: chunks of 64 MB, shuffled as its default has it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import rows
from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming.writer import BinaryWriter
from rows import Batch


def write(kind: str, folder: Path) -> None:
    """What `litdata.optimize` does in each of its processes."""
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, row in enumerate(rows.records(kind)):
        writer[number] = {name: value if isinstance(value, bytes) else np.atleast_1d(value) for name, value in row.items()}
    writer.done()
    writer.merge()


def read(found: list[dict[str, object]], kind: str) -> Batch:
    """A batch of rows."""
    label = [{**row, "label": np.asarray(row["label"])[0]} if "label" in row else row for row in found]
    return rows.batch_of_records(kind, label)


def batches(kind: str, folder: Path, workers: int) -> Iterator[Batch]:
    """Epoch after epoch."""
    loader = StreamingDataLoader(
        StreamingDataset(str(folder), shuffle=True, seed=0),
        batch_size=rows.BATCH_ROWS[kind],
        num_workers=workers,
        collate_fn=partial(read, kind=kind),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
    )
    while True:
        yield from loader
