"""From a run's events to MLflow: where the store is, what reaches it whatever fails, and what the caller notices: nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raymill.errors import RunError
from raymill.files import read_record, write_record
from raymill.record.events import (
    AttemptStarted,
    CheckpointSaved,
    EvaluationDone,
    Event,
    EventWriter,
    FirstStepDone,
    RunFinished,
    RunStopped,
    StepDone,
    append_event,
)
from raymill.record.folder import RunFolder, run_folder
from raymill.tracking import mlflow_sync, plots
from raymill.tracking.description import DESCRIPTION_TAG
from raymill.tracking.mlflow_client import tracking_uri


def step(number: int, **metrics: float) -> StepDone:
    return StepDone(step=number, epoch=0, rows=10 * number, metrics=metrics or {"train/loss": 1.0})


def new_run(register: dict[str, str] | None = None) -> RunFolder:
    folder = run_folder("run-1")
    folder.path.mkdir(parents=True)
    write_record(folder.spec, {"name": "job", "pipeline": "jobs.a:b", "register": register})
    return folder


# ---------------------------------------------------------------- where the store is


def test_importing_tracking_imports_neither_torch_nor_mlflow() -> None:
    modules = ", ".join(f"raymill.tracking.{name}" for name in ("mlflow_client", "mlflow_sync", "plots", "ui"))
    code = f"import {modules}, sys; print({{'torch', 'mlflow', 'ray', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_store_is_a_file_unless_the_environment_names_one(state_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri() == f"sqlite:///{state_folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri() == "http://127.0.0.1:5000"


SETTINGS = """
import json, os, sys
from raymill.tracking.mlflow_client import mlflow_settings
set_by_code, raises = sys.argv[1], sys.argv[2] == "raises"
import mlflow
if set_by_code:
    mlflow.set_tracking_uri(set_by_code)

def seen():
    settings = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    return settings, mlflow.get_tracking_uri(), mlflow.is_tracking_uri_set()

environment, before = dict(os.environ), seen()
try:
    with mlflow_settings():
        within = seen()
        if raises:
            raise RuntimeError
except RuntimeError:
    pass
print(json.dumps({"within": within, "as_before": [before == seen(), environment == dict(os.environ)]}))
"""

OWN = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


@pytest.mark.parametrize(
    ("given", "set_by_code", "ends", "uri"),
    [
        ({}, "", "returns", None),
        ({"MLFLOW_DISABLE_TELEMETRY": "false", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true"}, "", "raises", None),
        ({"MLFLOW_HTTP_REQUEST_TIMEOUT": "99"}, "", "returns", None),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "", "returns", "http://127.0.0.1:9"),
        ({}, "http://127.0.0.1:8", "raises", "http://127.0.0.1:8"),
    ],
    ids=["nothing set", "other settings", "a patience of their own", "a store in the environment", "a store set by code"],
)
def test_mlflow_reads_no_pickles_within_its_settings_and_is_afterwards_as_the_caller_had_it(
    given: dict[str, str], set_by_code: str, ends: str, uri: str | None, state_folder: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"DO_NOT_TRACK": "true"} | given
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS, set_by_code, ends], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = uri or f"sqlite:///{state_folder}/mlflow.db"
    # How long to wait is the user's choice; what is read, and that nothing is told to others, is not.
    assert found["within"] == [{**PATIENCE, **given, **OWN, "MLFLOW_TRACKING_URI": expected}, expected, True]
    assert found["as_before"] == [True, True]


# ---------------------------------------------------------------- delivery, to a store that fails


class FlakyStore:
    """A store in memory. `fails` says of each call of log_batch whether it fails "before" or "after" its work."""

    def __init__(self, fails: Callable[[int], str]) -> None:
        self.points: list[tuple[str, int, float]] = []
        self.tags: dict[str, str] = {}
        self.calls = 0
        self._fails = fails

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.calls += 1
        fails = self._fails(self.calls)
        if fails == "before":
            raise ConnectionError("gone before")
        self.points += [(metric.key, metric.step, metric.value) for metric in metrics]
        if fails == "after":
            raise ConnectionError("gone after")

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=at) for name, at, _ in self.points if name == key]

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.tags[key] = value

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(tags=self.tags, params={}))


def no_model(folder: RunFolder) -> dict[str, Any]:
    raise AssertionError("nothing was to be registered")


def opened(folder: RunFolder, store: FlakyStore) -> mlflow_sync.Delivery:
    write_record(folder.delivery, {"mlflow_run_id": "m1", "status": "RUNNING"})
    return mlflow_sync.Delivery(folder, no_model, lambda: store)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("fails", ["before", "after"])
def test_a_call_that_fails_before_or_after_its_work_loses_and_doubles_nothing(fails: str) -> None:
    folder = new_run()
    with EventWriter(folder.events) as writer:
        for number in range(1, 1301):
            writer.write(step(number, **{"train/loss": number / 2, "train/learning_rate": 0.1}))
    store = FlakyStore(lambda call: fails if call % 2 else "")
    under_test = opened(folder, store)
    tries = 0
    while True:
        tries += 1
        try:
            if not under_test.deliver():
                break
        except ConnectionError:
            continue
    assert tries > 4
    losses = [(at, value) for key, at, value in store.points if key == "train/loss"]
    assert losses == [(number, number / 2) for number in range(1, 1301)]
    assert len(store.points) == 2 * 1300


def test_a_new_process_that_lost_its_notes_doubles_nothing() -> None:
    folder = new_run()
    store = FlakyStore(lambda call: "")
    for number in range(1, 11):
        append_event(folder, step(number))
    assert opened(folder, store).deliver() == 10
    append_event(folder, step(11))
    assert opened(folder, store).deliver() == 11
    assert [at for _, at, _ in store.points] == [*range(1, 12)]


def test_steps_that_a_resumed_run_repeats_are_delivered_once() -> None:
    folder = new_run()
    store = FlakyStore(lambda call: "")
    for number in [1, 2, 3, 4, 2, 3, 4, 5, 6]:
        append_event(folder, step(number))
    under_test = opened(folder, store)
    under_test.deliver()
    for number in [5, 6, 7]:
        append_event(folder, step(number))
    under_test.deliver()
    assert [at for _, at, _ in store.points] == [1, 2, 3, 4, 5, 6, 7]


def test_a_secret_in_an_event_is_not_sent_and_what_mlflow_has_no_place_for_is_passed_over() -> None:
    folder = new_run()
    store = FlakyStore(lambda call: "")
    append_event(folder, FirstStepDone(step=1))
    append_event(folder, CheckpointSaved(step=1, path="https://me:hunter2@host/x", best=False))
    assert opened(folder, store).deliver() == 2
    assert store.tags == {"raymill.checkpoint.last": "https://me:***@host/x"}
    assert store.points == []


def test_how_far_the_delivery_is_stands_in_a_record_of_the_run() -> None:
    folder = new_run()
    append_event(folder, step(1))
    opened(folder, FlakyStore(lambda call: "")).deliver()
    done = read_record(folder.delivery)
    assert (done["mlflow_run_id"], done["offset"], done["steps"]) == ("m1", folder.events.stat().st_size, {"train/loss": 1})


class WholeStore(FlakyStore):
    """Also takes the end of a run; `log` holds what was asked of it and of the registry, in order."""

    def __init__(self) -> None:
        super().__init__(lambda call: "")
        self.log: list[str] = []

    def log_dict(self, run_id: str, document: dict[str, Any], name: str) -> None:
        self.log.append(name)

    def log_artifacts(self, run_id: str, folder: str, place: str) -> None:
        self.log.append(place)

    def set_terminated(self, run_id: str, status: str, ended_ms: int) -> None:
        self.log.append(status)

    def register(self, folder: RunFolder) -> dict[str, Any]:
        self.log.append(f"register {folder.run_id}")
        return {"name": "digits", "version": 3, "alias": "candidate"}


def delivered(folder: RunFolder, end: Event) -> WholeStore:
    store = WholeStore()
    for event in (step(1), EvaluationDone(step=1, epoch=0, rows=5, metrics={"validation/loss": 0.5}), end):
        append_event(folder, event)
    write_record(folder.delivery, {"mlflow_run_id": "m1", "status": "RUNNING"})
    delivery = mlflow_sync.Delivery(folder, store.register, lambda: store)  # type: ignore[arg-type,return-value]
    assert delivery.ends()
    assert delivery.deliver() == 3
    assert not delivery.ends()
    return store


def test_a_finished_run_is_finished_in_mlflow_before_its_model_is_registered() -> None:
    folder = new_run(register={"model": "digits", "alias": "candidate"})
    store = delivered(folder, RunFinished(best_checkpoint="checkpoints/step-1.1", metrics={"validation/loss": 0.25}))
    assert store.log == ["spec.json", "FINISHED", "register run-1", "pictures"]
    assert read_record(folder.model_version) == {"name": "digits", "version": 3, "alias": "candidate"}
    assert read_record(folder.delivery)["status"] == "FINISHED"
    assert ("final/validation/loss", 1, 0.25) in store.points


@pytest.mark.parametrize(
    ("end", "log"),
    [
        (RunFinished(best_checkpoint=None, metrics={}), ["spec.json", "FINISHED", "pictures"]),
        (RunStopped(reason="failed", message="rank 1 died"), ["FAILED", "pictures"]),
        (RunStopped(reason="interrupted", message=""), ["KILLED", "pictures"]),
    ],
)
def test_a_run_that_names_no_model_or_did_not_finish_registers_nothing(end: Event, log: list[str]) -> None:
    folder = new_run(register=None if isinstance(end, RunFinished) else {"model": "digits", "alias": "candidate"})
    assert delivered(folder, end).log == log
    assert not folder.model_version.exists()


def test_an_attempt_that_follows_a_stop_has_taken_its_end_back() -> None:
    folder = new_run()
    start = AttemptStarted(attempt=2, num_workers=1, step=1, num_total_steps=8, resumed=True)
    for event in (step(1), RunStopped(reason="interrupted", message=""), start):
        append_event(folder, event)
    assert not opened(folder, FlakyStore(lambda call: "")).ends()


def test_a_run_that_failed_says_why_and_how_to_go_on_without_secrets() -> None:
    store = delivered(new_run(), RunStopped(reason="failed", message="no such table at https://me:hunter2@host/x"))
    text = store.tags[DESCRIPTION_TAG]
    assert text.startswith("**Failed** at step 1.")
    assert "raymill train --resume run-1" in text
    assert "https://me:***@host/x" in text
    assert "hunter2" not in json.dumps(store.tags)


def test_a_model_that_was_refused_is_told_of_in_the_description() -> None:
    folder = new_run(register={"model": "digits", "alias": "candidate"})
    store = WholeStore()

    def refuse(folder: RunFolder) -> dict[str, Any]:
        raise RunError("its forward() branches")

    append_event(folder, step(1))
    append_event(folder, RunFinished(best_checkpoint="checkpoints/step-1.1", metrics={}))
    write_record(folder.delivery, {"mlflow_run_id": "m1", "status": "RUNNING"})
    delivery = mlflow_sync.Delivery(folder, refuse, lambda: store)  # type: ignore[arg-type,return-value]
    with pytest.raises(RunError, match="branches"):
        delivery.deliver()
    assert store.tags[DESCRIPTION_TAG].startswith("**Finished**")
    assert "**not registered**:\n\n```\nits forward() branches" in store.tags[DESCRIPTION_TAG]


def test_a_record_that_is_not_as_expected_leaves_the_description_out_and_stops_nothing() -> None:
    folder = new_run()
    write_record(folder.summary, {"rows": "all"})
    store = delivered(folder, RunFinished(best_checkpoint=None, metrics={}))
    assert "FINISHED" in store.log
    assert DESCRIPTION_TAG not in store.tags


def test_a_description_that_somebody_has_edited_stays_theirs() -> None:
    folder, store = new_run(), WholeStore()
    for text, replaced in (("", True), ("My notes", False)):
        store.tags[DESCRIPTION_TAG] = text
        append_event(folder, RunStopped(reason="interrupted", message=""))
        opened(folder, store).deliver()
        assert (store.tags[DESCRIPTION_TAG] != text) == replaced


# ---------------------------------------------------------------- pictures


def test_pictures_of_curves_and_of_square_totals_are_png_files(tmp_path: Path) -> None:
    events: list[Event] = [step(number) for number in range(3)]
    totals = {"validation/confusion": [[3, 1], [0, 4]], "validation/seen": [1, 2, 3], "validation/wide": [[1, 2, 3]]}
    events.append(EvaluationDone(step=2, epoch=0, rows=6, metrics={"validation/loss": 0.1}, totals=totals))
    plots.draw(events, tmp_path)
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["curves.png", "validation_confusion.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_a_confusion_matrix_with_an_empty_class_and_one_with_many_classes_are_drawn(tmp_path: Path) -> None:
    for num_classes in (3, 50):
        plots.confusion_matrix([[0] * num_classes] * num_classes, tmp_path / f"{num_classes}.png", "empty")
    assert len(list(tmp_path.glob("*.png"))) == 2
