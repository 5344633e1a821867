"""Data as another program wrote them, split by key, nulls left out, words fitted: bit-equal after a stop and a crash."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from probes import others
from raymill.task import Schema, Task
from worker_harness import Experiment, NewRun, stopped_and_killed, strict_at_other_numbers


def fares(schema: Schema) -> Task:
    return others.Fares()


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    folder = tmp_path / "trips"
    others.write(folder)
    make = partial(others.pipeline, str(folder), others.fitted(str(folder)))
    return Experiment(fares, make, others.VALUES)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stopped_and_killed_it_ends_with_the_same_weights(new_run: NewRun, experiment: Experiment, world_size: int) -> None:
    pair = stopped_and_killed(new_run, experiment, world_size)
    rows = [row for batch in pair.whole.batches.values() for row in batch]
    assert len(rows) == 2 * len(set(rows)), "each good row once in each epoch"
    errors = [metrics["validation/error"] for metrics in pair.expected.metrics("evaluation")]
    assert errors[-1] < errors[0]


def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun, experiment: Experiment) -> None:
    strict_at_other_numbers(new_run, experiment)
