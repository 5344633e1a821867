"""The rows of `mixed`, numbered, some of which are bad: refused by a check, or on a damaged page of a Parquet file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from probes.mixed import NUM_CLASSES, SCHEMA, TRAIN_ROWS, VALIDATION_ROWS, Mixed, jitter, make_rows
from raymill.data.sources import ArraySource, ParquetSource, write_parquet
from raymill.task import Field, Pipeline, Rows, Schema

FRAGMENT_ROWS = 7
NUMBERED: Schema = {**SCHEMA, "number": Field("int64")}
VALIDATION_FROM = 1000
"""Validation rows are numbered from here on, so that a check can tell them from training rows."""


def numbered(count: int, seed: int, start: int) -> Rows:
    return {**make_rows(count, seed), "number": np.arange(start, start + count)}


def refuse(rows: Rows, refused: frozenset[int]) -> dict[int, str]:
    return {place: f"number {number}" for place, number in enumerate(rows["number"]) if int(number) in refused}


def checked(refused: frozenset[int] = frozenset(), validation_rows: int = VALIDATION_ROWS) -> Pipeline:
    """Rows in memory; those of these numbers are refused."""
    makes = {
        "train": partial(numbered, TRAIN_ROWS, 1, 0),
        "validation": partial(numbered, validation_rows, 2, VALIDATION_FROM),
    }
    sources = {split: ArraySource(f"broken/{split}", make, FRAGMENT_ROWS) for split, make in makes.items()}
    return Pipeline(sources=sources, schema=NUMBERED, transform=jitter, check=partial(refuse, refused=refused))


class Crossed(nn.Module):
    """Its layers are not used in the order in which they are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, NUM_CLASSES)
        self.middle = nn.Linear(24, 16)
        self.body = nn.Linear(16, 24)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(torch.tanh(self.middle(torch.tanh(self.body(image.flatten(1))))))
        return scores


class Crossing(Mixed):
    """Trains it."""

    def build(self) -> nn.Module:
        return Crossed()


def from_parquet(folder: str) -> Pipeline:
    """The training rows from one file."""
    return Pipeline(sources={"train": ParquetSource(folder, SCHEMA)}, schema=SCHEMA, transform=jitter)


def write(folder: Path) -> Path:
    """Write the training rows as one file with row groups of `FRAGMENT_ROWS` rows; returns the file."""
    write_parquet(folder, make_rows(TRAIN_ROWS, 1), SCHEMA, num_shards=1, row_group_rows=FRAGMENT_ROWS)
    return folder / "part-00000.parquet"


def damage(file: Path, group: int) -> None:
    """Flip a bit in the first data page of a row group."""
    column = pq.read_metadata(file).row_group(group).column(0)
    content = bytearray(file.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    file.write_bytes(content)
