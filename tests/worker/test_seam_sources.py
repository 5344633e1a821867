"""Pictures in folders, tar files, with boxes and masks, and JSON Lines, split by share: bit-equal after a stop and a crash."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from probes import pictures
from raymill.data.sources import arrow_ipc, cached, tar
from raymill.data.sources.lines import pieces
from raymill.data.sources.pictures import samples
from raymill.task import Pipeline, Schema, Task
from worker_harness import Experiment, NewRun, stopped_and_killed, strict_at_other_numbers


def brightness(schema: Schema) -> Task:
    return pictures.Brightness()


def in_small_pieces(make_pipeline: Callable[[], Pipeline]) -> Pipeline:
    """As if there were more of it."""
    pieces.PIECE_BYTES, samples.MOST_FILES, tar.MOST_BYTES, arrow_ipc.MOST_BYTES = 2000, 7, 3000, 3000
    return make_pipeline()


@pytest.fixture(params=pictures.KINDS)
def experiment(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    for module, name in ((pieces, "PIECE_BYTES"), (samples, "MOST_FILES"), (tar, "MOST_BYTES"), (arrow_ipc, "MOST_BYTES")):
        monkeypatch.setattr(module, name, getattr(module, name))
    make = partial(in_small_pieces, pictures.made(request.param, tmp_path / "data"))
    assert len(make().sources["train"].fragments()) > 5
    return Experiment(brightness, make, pictures.VALUES, chunk_rows=7)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stopped_and_killed_it_ends_with_the_same_weights(new_run: NewRun, experiment: Experiment, world_size: int) -> None:
    pair = stopped_and_killed(new_run, experiment, world_size)
    assert pair.expected.metrics("evaluation")[-1]["validation/accuracy"] > 0.7, "half of them would be chance"


@pytest.mark.parametrize("world_size", [1, 2])
def test_with_rows_that_are_kept_on_disk_it_ends_with_the_weights_of_those_that_are_not(
    new_run: NewRun, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MOST_FILES", samples.MOST_FILES)
    make = partial(in_small_pieces, pictures.made("folders", tmp_path / "data"))
    plain = new_run(Experiment(brightness, make, pictures.VALUES, chunk_rows=7)).go(world_size)
    kept = partial(with_rows_kept, make, str(tmp_path / "state"))
    pair = stopped_and_killed(new_run, Experiment(brightness, kept, pictures.VALUES, chunk_rows=7), world_size)
    assert pair.expected.sha256 == plain.sha256
    num_fragments = sum(len(source.fragments()) for source in make().sources.values())
    assert len(list((tmp_path / "state/cache/rows").glob("*.rows"))) == num_fragments


def with_rows_kept(make_pipeline: Callable[[], Pipeline], state: str) -> Pipeline:
    """The same, each source with its rows kept in a state folder."""
    os.environ["RAYMILL_HOME"] = state
    made = make_pipeline()
    return replace(made, sources={name: cached(source) for name, source in made.sources.items()})


def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun, experiment: Experiment) -> None:
    strict_at_other_numbers(new_run, experiment)
