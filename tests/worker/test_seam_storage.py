"""Files of an object store that fails now and then: bit-equal after a stop and a crash, and as from disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest

from object_store import ObjectStore, serving
from probes import pictures
from raymill.data.sources import arrow_ipc, tar
from raymill.data.sources.lines import pieces
from raymill.data.sources.pictures import samples
from raymill.storage import far
from raymill.task import Pipeline, Schema, Task
from worker_harness import Experiment, NewRun, stopped_and_killed

KINDS = ("500", "503", "cut")

VALUES = {**pictures.VALUES, "loop": {**pictures.VALUES["loop"], "epochs": 2}}


def brightness(schema: Schema) -> Task:
    return pictures.Brightness()


def in_small_pieces(make_pipeline: Callable[[], Pipeline], environment: Mapping[str, str]) -> Pipeline:
    """As if there were more of it; in a process that finds the service and does not wait long."""
    pieces.PIECE_BYTES, samples.MOST_FILES, tar.MOST_BYTES, arrow_ipc.MOST_BYTES = 2000, 7, 3000, 3000
    far.WAITS_S, far.CLIENT_TRIES = (0.01,) * 12, 1
    os.environ.update(environment)
    # A rank process may have found another service before.
    far.far.cache_clear()
    return make_pipeline()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    for module, name in ((pieces, "PIECE_BYTES"), (samples, "MOST_FILES"), (tar, "MOST_BYTES"), (arrow_ipc, "MOST_BYTES")):
        monkeypatch.setattr(module, name, getattr(module, name))
    for name in ("WAITS_S", "CLIENT_TRIES"):
        monkeypatch.setattr(far, name, getattr(far, name))
    with serving() as store:
        yield store
    far.far.cache_clear()


@pytest.mark.parametrize(("kind", "world_size"), [("lines", 1), ("folders", 2), ("tar", 3), ("arrow", 2)])
def test_stopped_and_killed_it_ends_with_the_weights_of_the_same_rows_on_disk(
    kind: str, world_size: int, store: ObjectStore, new_run: NewRun, tmp_path: Path
) -> None:
    near = pictures.made(kind, tmp_path / "data")
    address = store.upload(tmp_path / "data", "pictures")
    store.fault = lambda number, method, path: KINDS[number % 3] if number % 10 == 0 else None
    made = partial(in_small_pieces, partial(near.func, address), store.environment)
    pair = stopped_and_killed(new_run, Experiment(brightness, made, VALUES, chunk_rows=7), world_size)
    assert store.faults > 5
    from_disk = partial(in_small_pieces, near, store.environment)
    whole = new_run(Experiment(brightness, from_disk, VALUES, chunk_rows=7))
    assert whole.go(world_size).sha256 == pair.expected.sha256
    assert whole.batches == pair.whole.batches
