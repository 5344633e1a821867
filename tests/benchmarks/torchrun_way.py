"""The way without Ray: plain DDP under `python -m torch.distributed.run`, fed by a DataLoader or from memory.

    PYTHONPATH=. python -m torch.distributed.run --standalone --nproc-per-node=2 tests/benchmarks/torchrun_way.py --data FOLDER

* `--loader-workers N`: a map-style dataset over the same Parquet files whose row groups are decoded once and kept, a
  DistributedSampler, and N loader processes per rank.
* `--fetch batch`: the same, but the dataset is asked for all rows of a batch in one go (`__getitems__`).
* `--in-memory`: the normalised tensors lie in memory before the first step, so what is left is DDP itself. No way of
  feeding it can be faster.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from jobs.mnist.model import Cnn
from measure import Clock, process_start_s, training_arguments

ROW_GROUPS_KEPT = 1024

Batch = tuple[torch.Tensor, torch.Tensor]
"""Images float32 [n, 1, 28, 28] in 0..1, labels int64 [n]."""

Feed = Callable[[int], Iterator[Batch]]
"""Epoch -> this rank's batches."""


def main() -> None:
    """Train, and print the JSON object on rank 0's stdout."""
    parser = training_arguments(__doc__ or "")
    parser.add_argument("--loader-workers", type=int, default=0, help="loader processes per rank")
    parser.add_argument("--fetch", choices=["row", "batch"], default="row", help="what the dataset is asked for")
    parser.add_argument("--in-memory", action="store_true", help="no loader; all tensors made before the first step")
    options = parser.parse_args()
    # The command is the launcher, which is this process's parent.
    os.environ.setdefault("T0", str(psutil.Process(os.getppid()).create_time()))
    clock = Clock(process_start_s())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")

    batch_rows = options.global_batch_rows // dist.get_world_size()
    files = sorted((options.data / "train").glob("*.parquet"))
    rows = BatchedRows(files) if options.fetch == "batch" else ParquetRows(files)
    feed = memory_feed(rows, batch_rows) if options.in_memory else loader_feed(rows, batch_rows, options.loader_workers)
    checkpoint = options.checkpoints / "last.pt" if options.checkpoint_every_steps else None
    loss = train(
        Cnn(width=options.width, num_classes=10), feed, options.epochs, clock, checkpoint, options.checkpoint_every_steps
    )
    if dist.get_rank() == 0:
        print(json.dumps({**clock.result(), "loss": loss}))
    # Without it, a rank that leaves while the other still closes its connections aborts now and then, at exit.
    dist.barrier()
    dist.destroy_process_group()


def train(network: torch.nn.Module, feed: Feed, epochs: int, clock: Clock, checkpoint: Path | None, every_steps: int) -> float:
    """The loop of every worker, restarted from the last checkpoint's epoch. Returns the last loss of this rank."""
    model = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    first_epoch = steps = 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first_epoch = saved["epoch"]
    for epoch in range(first_epoch, epochs):
        for images, labels in feed(epoch):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.step(epoch, len(labels) * dist.get_world_size())
            steps += 1
            if checkpoint is not None and steps % every_steps == 0 and dist.get_rank() == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").rename(checkpoint)
    return loss.item()


# ---------------------------------------------------------------- feeding


def loader_feed(rows: ParquetRows, batch_rows: int, num_workers: int) -> Feed:
    """Batches of a DataLoader whose worker processes outlive the epoch."""
    sampler: DistributedSampler[Batch] = DistributedSampler(rows, shuffle=True, seed=0)
    loader = DataLoader(
        rows,
        batch_size=batch_rows,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        collate_fn=as_fetched if isinstance(rows, BatchedRows) else None,
    )

    def feed(epoch: int) -> Iterator[Batch]:
        sampler.set_epoch(epoch)
        return iter(loader)

    return feed


def as_fetched(batch: Batch) -> Batch:
    """The collate function of a dataset that already returns batches."""
    return batch


def memory_feed(rows: ParquetRows, batch_rows: int) -> Feed:
    """Batches cut from tensors of the whole split, another shuffle each epoch."""
    images, labels = rows.take(np.arange(len(rows)))
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def feed(epoch: int) -> Iterator[Batch]:
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for mine in shuffled[: len(labels) // world_size * world_size][rank::world_size].split(batch_rows):
            yield images[mine], labels[mine]

    return feed


class ParquetRows(Dataset[Batch]):
    """The rows of Parquet files by index.

    Args:
        files: with columns image, fixed_size_binary(784), and label, int64.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        metadata = {file: pq.read_metadata(file) for file in files}
        self.groups = [(file, group) for file in files for group in range(metadata[file].num_row_groups)]
        sizes = [metadata[file].row_group(group).num_rows for file, group in self.groups]
        self.starts = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Batch:
        pixels, labels, row = self._locate(index)
        return torch.from_numpy(pixels[row].astype(np.float32) / 255).view(1, 28, 28), torch.tensor(labels[row])

    def take(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Several rows as one batch."""
        located = [self._locate(int(index)) for index in indices]
        pixels = np.stack([group_pixels[row] for group_pixels, _, row in located])
        labels = np.array([group_labels[row] for _, group_labels, row in located])
        images = torch.from_numpy(pixels.astype(np.float32) / 255).view(-1, 1, 28, 28)
        return images, torch.from_numpy(labels)

    def _locate(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        group = bisect_right(self.starts, index) - 1
        return *read_row_group(*self.groups[group]), index - self.starts[group]


class BatchedRows(ParquetRows):
    """The same, but DataLoader asks for all rows of a batch at once."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.take(indices)


@lru_cache(maxsize=ROW_GROUPS_KEPT)
def read_row_group(file: Path, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 784] and labels int64 [n] of one row group."""
    table = pq.ParquetFile(file).read_row_group(group, columns=["image", "label"])
    pixels = np.frombuffer(b"".join(table["image"].to_pylist()), np.uint8).reshape(-1, 784)
    return pixels, table["label"].to_numpy()


if __name__ == "__main__":
    main()
