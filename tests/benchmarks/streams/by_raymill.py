"""raymill's stream as a worker has it: the windows of a job's order, read, shuffled, cut into batches and collated.

`workers` 0: in this process; more: CPUs that Ray Data reads with, as on a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rows
from rows import Batch

from raymill.data.feed import Feed
from raymill.data.order import BatchSharding, JobOrder, SplitOrder
from raymill.data.ray_stream import prefetched, receive, split_with_ray
from raymill.data.reader import Reader, read_locally
from raymill.data.sources.parquet import ParquetSource, write_parquet
from raymill.data.sources.pictures.decode import decode_images
from raymill.data.sources.pictures.folder import ImageFolderSource
from raymill.task import TRAIN, Field, Pipeline, Rows
from raymill.training.batch import default_collate

NUMBERS = {**{f"x{i}": Field("float32") for i in range(12)}, **{f"n{i}": Field("int64") for i in range(4)}}
COLUMNS = {
    "raw": {"image": Field("uint8", (3, 32, 32)), "label": Field("int64")},
    "tokens": {"tokens": Field("int32", (1025,))},
    "tabular": {**NUMBERS, "label": Field("int64")},
}
EPOCHS = 100
WINDOW_BYTES = 16 * 2**20
"""As a plan has it."""


def write(kind: str, folder: Path) -> None:
    """Parquet files; or pictures as files."""
    if kind == "jpeg":
        return rows.write_pictures(folder)
    found, count = rows.columns(kind), rows.NUM_ROWS[kind]
    return write_parquet(
        folder, found, COLUMNS[kind], num_shards=8, row_group_rows=max(1000 if kind == "raw" else count // 64, 1)
    )


def decode(found: Rows, split: str, generator: np.random.Generator) -> Rows:
    """The transform of pictures; the number of a row is its file's name."""
    number = np.array([int(path.rpartition("/")[2].partition(".")[0]) for path in found["path"]], np.int64)
    return {"image": decode_images(found["image"], (224, 224)), "label": number}


def scaled(found: Rows) -> Batch:
    """The collate function of raw pictures."""
    batch = default_collate(found)
    return {**batch, "image": batch["image"].float().div_(255)}


def pipeline(kind: str, folder: Path) -> Pipeline:
    """A job's data."""
    if kind == "jpeg":
        pictures = ImageFolderSource(str(folder))
        return Pipeline(sources={TRAIN: pictures}, schema=pictures.schema, transform=decode)
    source = ParquetSource(str(folder), COLUMNS[kind])
    return Pipeline(sources={TRAIN: source}, schema=COLUMNS[kind], collate=scaled if kind == "raw" else None)


def batches(kind: str, folder: Path, workers: int) -> Iterator[Batch]:
    """Epoch after epoch."""
    data, batch_rows = pipeline(kind, folder), rows.BATCH_ROWS[kind]
    fragments = data.sources[TRAIN].fragments()
    counts = np.array([fragment.num_rows for fragment in fragments], np.int64)
    num_rows, num_bytes = int(counts.sum()), sum(fragment.num_bytes for fragment in fragments)
    windows = max(8, -(-num_bytes // WINDOW_BYTES))
    order = JobOrder(SplitOrder(TRAIN, counts, windows, 0, shuffle=True), (), EPOCHS * -(-num_rows // batch_rows), batch_rows)
    sharding = BatchSharding(num_rows, batch_rows, 1, 1)
    chunk_rows = 400 if kind == "jpeg" else 0
    reader = Reader("benchmark", order, {TRAIN: sharding}, {TRAIN: fragments}, data, chunk_rows=chunk_rows)
    if workers:
        import ray

        ray.init(num_cpus=workers, **rows.RAY)
        [iterator] = split_with_ray(reader, 0, 1, data_cpus=workers, task_cpus=1)
        packets = prefetched(receive(iterator, 0), 2)
    else:
        packets = read_locally(reader, 0, 0)
    feed, collate = Feed(packets), data.collate or default_collate
    for epoch in range(EPOCHS):
        for start in range(0, num_rows, batch_rows):
            taken = feed.take(TRAIN, epoch, min(batch_rows, num_rows - start))
            yield collate(taken)
        feed.finish(TRAIN, epoch, windows)
