"""A job that is as slow as a test wants, on the ranks and in the places it wants, and that notes how long each place took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.data.sources import ArraySource
from raymill.parallel.process_group import rank_and_world_size
from raymill.task import Field, Fragment, Pipeline, Rows, Schema, Task

BATCH_ROWS = 12
STEPS = 13

SCHEMA: Schema = {"x": Field("float32", (4,)), "label": Field("int64", classes=2)}

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "SGD", "lr": 0.01},
    # A window is a batch: each rank reads and transforms once a step.
    "loop": {"epochs": 1, "global_batch_rows": BATCH_ROWS, "window_rows": BATCH_ROWS, "record_order": False},
    "checkpoint": {"every_steps": 1000},
}

Sleeps = Mapping[tuple[str, int], float]
"""(place, rank) -> seconds. A place is "read", "transform", "collate", "loss", or "read_validation"."""


@dataclass
class Log:
    """What one process saw, in seconds of its own clock.

    Attributes:
        waited_s: per window of training, from the beginning of its reading to the end of its transform.
        fetched_s: per window, until it came, where windows are read ahead.
        collated_s: per step, collating.
        forwards_s: per step, when its forward pass began.
    """

    waited_s: list[float] = field(default_factory=list)
    fetched_s: list[float] = field(default_factory=list)
    collated_s: list[float] = field(default_factory=list)
    forwards_s: list[float] = field(default_factory=list)
    read_began_s: float = 0.0


log = Log()


def pause(sleeps: Sleeps, place: str) -> None:
    time.sleep(sleeps.get((place, rank_and_world_size()[0]), 0.0))


def make_rows(count: int) -> Rows:
    generator = np.random.default_rng(3)
    return {"x": generator.normal(size=(count, 4)).astype(np.float32), "label": generator.integers(0, 2, count)}


@dataclass(frozen=True)
class SleepySource:
    """Rows in memory that take their time."""

    inner: ArraySource
    sleeps: Sleeps
    place: str

    def fragments(self) -> Sequence[Fragment]:
        return self.inner.fragments()

    def read(self, fragment: Fragment) -> Rows:
        log.read_began_s = time.perf_counter()
        pause(self.sleeps, self.place)
        return self.inner.read(fragment)


def pipeline(sleeps: Sleeps, in_turn: bool = False, validation_rows: int = 0) -> Pipeline:
    """With these sleeps; in turn: each step's reading is slow on one rank only, on the next one in the next step."""

    def transform(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
        if split == "train":
            rank, world_size = rank_and_world_size()
            if not in_turn or len(log.waited_s) % world_size == rank:
                pause(sleeps, "transform")
            log.waited_s.append(time.perf_counter() - log.read_began_s)
        return rows

    def collate(rows: Rows) -> Any:
        began_s = time.perf_counter()
        pause(sleeps, "collate")
        log.collated_s.append(time.perf_counter() - began_s)
        return {name: torch.from_numpy(np.array(column)) for name, column in rows.items()}

    def source(name: str, count: int, place: str) -> SleepySource:
        return SleepySource(ArraySource(f"sleepy/{name}", partial(make_rows, count), BATCH_ROWS), sleeps, place)

    sources = {"train": source("train", STEPS * BATCH_ROWS, "read")}
    if validation_rows:
        sources["validation"] = source("validation", validation_rows, "read_validation")
    return Pipeline(sources=sources, schema=SCHEMA, transform=transform, collate=collate)


class Sleepy(Task):
    """A tiny model whose loss takes its time."""

    def __init__(self, schema: Schema, sleeps: Sleeps) -> None:
        self.sleeps = sleeps

    def build(self) -> nn.Module:
        return nn.Linear(4, 2)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        log.forwards_s.append(time.perf_counter())
        pause(self.sleeps, "loss")
        return functional.cross_entropy(model(batch["x"]), batch["label"])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": functional.cross_entropy(model(batch["x"]), batch["label"], reduction="none")}
