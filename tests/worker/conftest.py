from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from worker_harness import Experiment, NewRun, RankPool, TrainingRun


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four rank processes for all tests."""
    opened = RankPool(4)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    """What a test draws in this process is drawn alike each time, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture
def new_run(pool: RankPool, tmp_path: Path) -> NewRun:
    """Makes runs, each in a folder of its own."""
    made: list[TrainingRun] = []

    def make(experiment: Experiment) -> TrainingRun:
        made.append(TrainingRun(pool, tmp_path / f"run-{len(made)}", experiment))
        return made[-1]

    return make
