"""What a resume costs: bytes read again, seconds to the first batch, size of the position, time to plan a huge order.

Run it from the project's root; it makes its own rows:

    python tests/benchmarks/resume.py --out resume.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raymill.data.feed import Feed
from raymill.data.order import BatchSharding, JobOrder, SplitOrder, Stream, num_batches, window
from raymill.data.reader import Reader, read_locally
from raymill.data.sources import ParquetSource, write_parquet
from raymill.task import TRAIN, Field, Fragment, Pipeline, Rows

NUM_ROWS, ROW_GROUP_ROWS, WINDOW_ROWS, BATCH_ROWS, WORLD_SIZE = 200_000, 500, 4_000, 200, 2
SCHEMA = {"features": Field("float32", (64,)), "label": Field("int64", classes=10)}
SHARES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass
class Counting:
    """A source that adds up the bytes it reads."""

    source: ParquetSource
    read_bytes: list[int] = field(default_factory=list)

    def fragments(self) -> Sequence[Fragment]:
        """The pieces of the source."""
        return self.source.fragments()

    def read(self, fragment: Fragment) -> Rows:
        """Read one piece, and count it."""
        self.read_bytes.append(fragment.num_bytes)
        return self.source.read(fragment)


def make_data(folder: Path) -> None:
    """Write made-up rows as Parquet."""
    generator = np.random.default_rng(0)
    rows: Rows = {
        "features": generator.normal(size=(NUM_ROWS, 64)).astype(np.float32),
        "label": generator.integers(0, 10, NUM_ROWS),
    }
    write_parquet(folder, rows, SCHEMA, num_shards=8, row_group_rows=ROW_GROUP_ROWS)


def measure(folder: Path, share: float) -> dict[str, float]:
    """Resume one epoch at this share of its steps, and read it to its end as both ranks would."""
    counting = Counting(ParquetSource(str(folder), SCHEMA))
    fragments = counting.fragments()
    fragment_rows = np.array([fragment.num_rows for fragment in fragments], np.int64)
    order = JobOrder(
        SplitOrder(TRAIN, fragment_rows, num_batches(NUM_ROWS, WINDOW_ROWS), 0, True),
        (),
        num_batches(NUM_ROWS, BATCH_ROWS),
        BATCH_ROWS,
    )
    cut = BatchSharding(NUM_ROWS, BATCH_ROWS, WORLD_SIZE, WORLD_SIZE)
    reader = Reader("benchmark", order, {TRAIN: cut}, {TRAIN: fragments}, Pipeline(sources={TRAIN: counting}, schema=SCHEMA))
    position = int(share * order.steps_per_epoch) * BATCH_ROWS
    start_s = time.perf_counter()
    # One rank reads for both here: a window is read once in a run, whatever the number of ranks.
    feed = Feed(read_locally(reader, position, 0))
    feed.take(TRAIN, 0, BATCH_ROWS // WORLD_SIZE)
    first_batch_s = time.perf_counter() - start_s
    for _ in range(position // BATCH_ROWS + 1, order.steps_per_epoch):
        feed.take(TRAIN, 0, BATCH_ROWS // WORLD_SIZE)
    feed.finish(TRAIN, 0, order.train.num_windows)
    total_bytes = sum(fragment.num_bytes for fragment in fragments)
    left_bytes = total_bytes * (NUM_ROWS - position) // NUM_ROWS
    widest = max(
        sum(fragments[f].num_bytes for f in window(order.train, 0, index).fragments) for index in range(order.train.num_windows)
    )
    return {
        "share": share,
        "read_bytes": sum(counting.read_bytes),
        "left_bytes": left_bytes,
        "window_bytes": widest,
        "extra_windows": (sum(counting.read_bytes) - left_bytes) / widest,
        "first_batch_s": first_batch_s,
    }


def plan_huge() -> dict[str, float]:
    """Find the place of a resume among 10^9 rows in 10^6 fragments."""
    order = JobOrder(SplitOrder(TRAIN, np.full(10**6, 1000, np.int64), 10**5, 0, True), (), 3 * 10**6, 1000)
    position = 2_345_678_000
    start_s = time.perf_counter()
    stream = Stream(order, position)
    window(order.train, 2, stream[0].window)
    return {"plan_s": time.perf_counter() - start_s, "position_bytes": len(json.dumps({"position": position}))}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raymill-benchmark-") as folder:
        make_data(Path(folder) / "rows")
        rounds = [[measure(Path(folder) / "rows", share) for share in SHARES] for _ in range(options.repeats)]
    print(f"{'resumed at':>10} {'left MB':>9} {'read MB':>9} {'extra windows':>14} {'first batch s':>14}")
    for index, share in enumerate(SHARES):
        once = rounds[0][index]
        first_s = statistics.median(one[index]["first_batch_s"] for one in rounds)
        print(
            f"{share:>10.0%} {once['left_bytes'] / 1e6:>9.1f} {once['read_bytes'] / 1e6:>9.1f}"
            f" {once['extra_windows']:>14.2f} {first_s:>14.4f}"
        )
    huge = plan_huge()
    print(f"10^9 rows in 10^6 fragments: position {huge['position_bytes']} bytes, found in {huge['plan_s']:.2f} s")
    if options.out:
        options.out.write_text(json.dumps({"rounds": rounds, "huge": huge}, indent=1))


if __name__ == "__main__":
    main()
