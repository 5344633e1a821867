"""MosaicML Streaming: MDS shards of 64 MiB, shuffled as its default has it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import rows
from rows import Batch
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

COLUMNS = {
    "raw": {"image": "ndarray:uint8:3,32,32", "label": "int64"},
    "jpeg": {"image": "bytes", "label": "int64"},
    "tokens": {"tokens": "ndarray:int32:1025"},
    "tabular": {"numbers": "ndarray:float32:12", "ids": "ndarray:int64:4", "label": "int64"},
}


def write(kind: str, folder: Path) -> None:
    """As its documentation has it."""
    with MDSWriter(out=str(folder), columns=COLUMNS[kind]) as writer:
        for row in rows.records(kind):
            writer.write(row)


def batches(kind: str, folder: Path, workers: int) -> Iterator[Batch]:
    """Epoch after epoch."""
    batch_rows = rows.BATCH_ROWS[kind]
    data = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=0, batch_size=batch_rows)
    loader = DataLoader(
        data,
        batch_rows,
        num_workers=workers,
        collate_fn=partial(rows.batch_of_records, kind),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
    )
    while True:
        yield from loader
