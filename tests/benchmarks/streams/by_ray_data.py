"""Ray Data: Parquet through `iter_torch_batches`, with a buffer of 1,000 rows, as its documentation teaches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rows
from rows import Batch


def write(kind: str, folder: Path) -> None:
    """Eight files; arrays as Ray Data writes them."""
    from ray.data.extensions import ArrowTensorArray

    found = rows.columns(kind)
    arrays = {
        name: ArrowTensorArray.from_numpy(column) if isinstance(column, np.ndarray) and column.ndim > 1 else pa.array(column)
        for name, column in found.items()
    }
    table = pa.table(arrays)
    size = -(-len(table) // 8)
    for number in range(8):
        pq.write_table(table.slice(number * size, size), folder / f"{number}.parquet", row_group_size=max(1, size // 8))


def ready(found: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """What the batches are made of."""
    if kind == "jpeg":
        return {**found, "image": np.stack([rows.decoded(file) for file in found["image"]])}
    if kind == "raw":
        return {**found, "image": found["image"].astype(np.float32) / 255}
    return found


def batches(kind: str, folder: Path, workers: int) -> Iterator[Batch]:
    """Epoch after epoch; `workers`: CPUs of the cluster."""
    import ray

    ray.init(num_cpus=workers, **rows.RAY)
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.read_parquet(str(folder))
    if kind in ("raw", "jpeg"):
        data = data.map_batches(ready, fn_kwargs={"kind": kind}, batch_size=256)
    while True:
        yield from data.iter_torch_batches(batch_size=rows.BATCH_ROWS[kind], local_shuffle_buffer_size=1000, prefetch_batches=4)
