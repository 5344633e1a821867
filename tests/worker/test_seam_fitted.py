"""What is fitted on the training rows, used by pipeline and task: bit-equal after a stop and a crash; kept and verified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes import fitted as texts
from raymill.data.fit import MAX_BYTES, fit
from raymill.errors import CheckpointError, InputError
from raymill.record import fitted
from raymill.task import Rows
from worker_harness import Experiment, NewRun, stopped_and_killed, strict_at_other_numbers


def fit_texts() -> dict[str, bytes]:
    pipeline = texts.pipeline({})
    return fit(pipeline, pipeline.sources["train"].fragments(), 4, lenient=False)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    made = fit_texts()
    return Experiment(partial(texts.Reads, fitted=made), partial(texts.pipeline, made), texts.VALUES)


def test_it_is_fitted_on_all_training_rows_and_on_no_other() -> None:
    rows = texts.make_rows(50, 1)
    made = fit_texts()
    assert json.loads(made["words"]) == sorted({word for text in rows["text"] for word in text.split()})
    assert json.loads(made["scale"])["mean"] == pytest.approx(float(np.mean(rows["price"])))
    assert fit_texts() == made
    assert fit(replace(texts.pipeline({}), fit=None), [], 0, lenient=False) == {}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stopped_and_killed_it_ends_with_the_same_weights(new_run: NewRun, experiment: Experiment, world_size: int) -> None:
    expected = stopped_and_killed(new_run, experiment, world_size).expected
    assert expected.metrics("evaluation")[-1]["validation/loss"] < 0.6, "it learned what the words mean"


def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun, experiment: Experiment) -> None:
    strict_at_other_numbers(new_run, experiment)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, "nothing, by no name"),
        ({"words": "text"}, "fit"),
        ([b"words"], "fit"),
        ({"words": bytes(MAX_BYTES + 1)}, "bytes in all"),
    ],
)
def test_what_is_no_bytes_or_too_many_is_refused(made: Any, found: str) -> None:
    def gives(rows: Iterator[Rows]) -> Any:
        return made

    with pytest.raises(InputError, match=found):
        fit(replace(texts.pipeline({}), fit=gives), [], 0, lenient=False)


def test_what_was_changed_is_refused_by_its_name(tmp_path: Path) -> None:
    made = {"words": b"[1]", "scale": bytes(range(256))}
    assert fitted.read(tmp_path) == {}
    fitted.keep(tmp_path, made)
    assert fitted.read(tmp_path) == made
    text = (tmp_path / fitted.FILE).read_text()
    (tmp_path / fitted.FILE).write_text(text.replace("WzFd", "WzJd"))
    with pytest.raises(CheckpointError, match="artefact 'words' is not what was fitted"):
        fitted.read(tmp_path)
    (tmp_path / fitted.FILE).write_text(text.replace("WzFd", "?"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        fitted.read(tmp_path)
