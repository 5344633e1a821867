"""WebDataset: tar files of samples, in the order of shuffled shards, through a buffer of 1,000 rows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import rows
import webdataset as wds
from rows import Batch


def write(kind: str, folder: Path) -> None:
    """At least eight shards."""
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=-(-rows.NUM_ROWS[kind] // 8), maxsize=2**30) as writer:
        for number, row in enumerate(rows.records(kind)):
            parts = {name: value if isinstance(value, bytes) else as_file(np.asarray(value)) for name, value in row.items()}
            writer.write({"__key__": f"{number:08d}", **parts})


def as_file(value: np.ndarray) -> bytes:
    """An array as the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def read(samples: list[dict[str, bytes]], kind: str) -> Batch:
    """A batch of samples."""

    def row(sample: dict[str, bytes]) -> dict[str, object]:
        found = {name: value for name, value in sample.items() if not name.startswith("__")}
        return {
            name: value if kind == "jpeg" and name == "image" else np.load(io.BytesIO(value)) for name, value in found.items()
        }

    return rows.batch_of_records(kind, [row(sample) for sample in samples])


def batches(kind: str, folder: Path, workers: int) -> Iterator[Batch]:
    """Epoch after epoch; the last batch of each worker may be short."""
    shards = sorted(map(str, folder.glob("*.tar")))
    data = (
        wds.WebDataset(shards, shardshuffle=len(shards), seed=0)
        .shuffle(1000)
        .batched(rows.BATCH_ROWS[kind], collation_fn=partial(read, kind=kind))
    )
    loader = wds.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from loader
