"""A Parquet file as another program writes it: nulls, no schema, split by key, words fitted on the training part."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.nn import functional

from raymill.data.fit import fit
from raymill.data.sources import ParquetSource, resample, split_by_key
from raymill.task import Pipeline, Rows, Source, Task

NUM_ROWS = 240

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "AdamW", "lr": 0.02},
    "loop": {"epochs": 2, "global_batch_rows": 12, "seed": 1, "window_rows": 50},
    "bad_rows": {"policy": "skip", "budget": 60},
}


def write(folder: Path) -> None:
    """Trips, in three row groups: times, dictionaries, decimals, lists, a struct, and a null in every tenth row."""
    generator = np.random.default_rng(0)
    lines = generator.integers(0, 4, NUM_ROWS)
    fares = pa.array([None if row % 10 == 3 else 2 * int(line) + 0.5 for row, line in enumerate(lines)], pa.float64())
    columns = {
        "rider": pa.array([f"rider {number}" for number in generator.integers(0, 40, NUM_ROWS)], pa.large_string()),
        "line": pa.array([f"line {number}" for number in lines]).dictionary_encode(),
        "left": pa.array(generator.integers(0, 86_400_000_000, NUM_ROWS), pa.timestamp("us")),
        "fare": fares.cast(pa.decimal128(8, 2)),
        "stops": pa.array([list(range(int(count))) for count in generator.integers(0, 5, NUM_ROWS)], pa.large_list(pa.int16())),
        "at": pa.array([{"x": float(line), "y": 1.0} for line in lines]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "trips.parquet", row_group_size=NUM_ROWS // 3)


def line_names(rows: Iterator[Rows]) -> dict[str, bytes]:
    """Of the training rows."""
    return {"lines": json.dumps(sorted({name for some in rows for name in some["line"]})).encode()}


def encode(rows: Rows, split: str, generator: np.random.Generator, names: list[str]) -> Rows:
    """Numbers of it all."""
    hours = np.asarray(rows["left"]) / 3.6e9
    jitter = generator.normal(0, 0.1, len(hours)) if split == "train" else 0
    stops = [len(stops) for stops in rows["stops"]]
    return {
        "line": np.array([names.index(name) + 1 if name in names else 0 for name in rows["line"]], np.int64),
        "numbers": np.stack([hours / 24 + jitter, stops, np.asarray(rows["at.x"])], axis=1).astype(np.float32),
        "fare": np.asarray(rows["fare"], np.float32),
    }


def pipeline(folder: str, fitted: Mapping[str, bytes]) -> Pipeline:
    """The rows."""
    source = ParquetSource.inferred(folder, nulls="bad_rows")
    sources: dict[str, Source] = {**split_by_key(source, "rider", {"train": 0.75, "validation": 0.25})}
    sources["train"] = resample(sources["train"], "line", {"line 0": 1.5, "line 3": 0.5})
    return Pipeline(
        sources=sources,
        schema=source.schema,
        transform=partial(encode, names=json.loads(fitted.get("lines", b"[]"))),
        fit=line_names,
        targets=["fare"],
    )


def fitted(folder: str) -> dict[str, bytes]:
    """What the pipeline fits."""
    made = pipeline(folder, {})
    return fit(made, made.sources["train"].fragments(), 1, lenient=True)


class Fares(Task):
    """Tells the fare."""

    def build(self) -> nn.Module:
        return Net()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.mse_loss(model(batch["line"], batch["numbers"]), batch["fare"])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"error": (model(batch["line"], batch["numbers"]) - batch["fare"]).abs()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Embedding(8, 4)
        self.rest = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))

    def forward(self, line: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        fares: torch.Tensor = self.rest(torch.cat([self.line(line), numbers], 1))[:, 0]
        return fares
