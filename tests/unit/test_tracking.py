"""The record of a run: the events' file, what is read out of it, what is hidden, and how it is delivered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raymill.errors import InputError
from raymill.redaction import redact
from raymill.runs.catalog import list_runs, show_run
from raymill.runs.environment import environment
from raymill.runs.events import EventWriter, append_event, read_events
from raymill.runs.folder import RunFolder, run_folder
from raymill.tracking import mlflow_sync, plots
from raymill.tracking.mlflow_client import tracking_uri

START = {"kind": "start", "attempt": 1, "num_workers": 2, "step": 0, "num_total_steps": 8, "resumed": False}


def step(number: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "step", "step": number, "epoch": 0, "rows": 10 * number, "metrics": metrics or {"train/loss": 1.0}}


def new_run(run_id: str = "run-1") -> RunFolder:
    folder = run_folder(run_id)
    folder.path.mkdir(parents=True)
    folder.spec.write_text(json.dumps({"name": "job", "pipeline": "jobs.a:b", "register": None}))
    return folder


# ---------------------------------------------------------------- events


def test_importing_tracking_imports_neither_torch_nor_mlflow() -> None:
    code = "import raymill.tracking, sys; print({'torch', 'mlflow', 'ray', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_events_come_back_in_order_with_their_time_and_the_offset_goes_on() -> None:
    folder = new_run()
    append_event(folder, START)
    first, offset = read_events(folder.events)
    append_event(folder, step(1))
    then, end = read_events(folder.events, offset)
    assert [event["kind"] for event in first + then] == ["start", "step"]
    assert first[0]["time_s"] <= then[0]["time_s"]
    assert (end, read_events(folder.events, end)) == (folder.events.stat().st_size, ([], end))


def test_no_file_is_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl", 7) == ([], 7)


def test_steps_wait_for_company_and_every_other_event_takes_them_along() -> None:
    folder = new_run()
    with EventWriter(folder.events, every_s=3600) as writer:
        writer.write(step(1))
        for number in (2, 3):
            writer.write(step(number))
        waiting = len(read_events(folder.events)[0])
        writer.write({"kind": "checkpoint", "step": 3, "path": "checkpoints/step-3", "best": True})
        assert [event["step"] for event in read_events(folder.events)[0]] == [1, 2, 3, 3]
    assert waiting < 3


def test_flush_and_close_write_what_waits() -> None:
    folder = new_run()
    writer = EventWriter(folder.events, every_s=3600)
    for number in range(3):
        writer.write(step(number))
    writer.flush()
    assert len(read_events(folder.events)[0]) == 3
    writer.write(step(3))
    writer.close()
    assert len(read_events(folder.events)[0]) == 4


def test_arrays_and_numpy_numbers_are_written_as_json() -> None:
    folder = new_run()
    totals = {"confusion": np.eye(2, dtype=np.int64)}
    append_event(folder, {"kind": "evaluation", "metrics": {"loss": np.float32(0.5)}, "totals": totals})
    (event,), _ = read_events(folder.events)
    assert (event["metrics"], event["totals"]) == ({"loss": 0.5}, {"confusion": [[1, 0], [0, 1]]})


def test_a_torn_last_line_waits_and_the_next_append_loses_only_it() -> None:
    folder = new_run()
    append_event(folder, step(1))
    whole = folder.events.stat().st_size
    with folder.events.open("a") as file:
        file.write('{"kind":"step","st')
    events, offset = read_events(folder.events)
    assert (len(events), offset) == (1, whole)
    append_event(folder, step(2))
    events, offset = read_events(folder.events, offset)
    assert [event["step"] for event in events] == [2]
    assert offset == folder.events.stat().st_size


def test_a_limit_ends_at_a_line_and_the_rest_follows() -> None:
    folder = new_run()
    for number in range(5):
        append_event(folder, step(number))
    first, offset = read_events(folder.events, 0, 3)
    rest, _ = read_events(folder.events, offset, 3)
    assert [event["step"] for event in first + rest] == [0, 1, 2, 3, 4]


def test_lines_of_several_writers_and_threads_never_mix() -> None:
    folder = new_run()

    def write(writer: EventWriter, first: int) -> None:
        for number in range(first, first + 200):
            writer.write(step(number, **{"a" * 500: 1.0}))

    with EventWriter(folder.events, every_s=0.001) as one, EventWriter(folder.events, every_s=0.0) as other:
        jobs = [(one, 0), (one, 1000), (other, 2000)]
        threads = [threading.Thread(target=write, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    steps = sorted(event["step"] for event in read_events(folder.events)[0])
    assert steps == [*range(200), *range(1000, 1200), *range(2000, 2200)]


# ---------------------------------------------------------------- what the files say

DEAD_PID = 2**22 + 1
"""Above the highest process number that Linux gives out."""


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ([], "running"),
        ([{"kind": "stop", "reason": "interrupted", "message": "asked to"}], "interrupted"),
        ([{"kind": "stop", "reason": "failed", "message": "rank 1 died"}], "failed"),
        ([{"kind": "end", "best_checkpoint": None, "metrics": {"validation/accuracy": 0.9}}], "finished"),
        ([{"kind": "stop", "reason": "failed", "message": ""}, {**START, "attempt": 2, "pid": os.getpid()}], "running"),
        ([{**START, "attempt": 2, "pid": DEAD_PID}], "interrupted"),
    ],
)
def test_a_runs_status_is_what_its_last_events_say(last: list[dict[str, Any]], status: str) -> None:
    folder = new_run()
    for event in [START, step(3), *last]:
        append_event(folder, event)
    assert show_run("run-1")["status"] == status


def test_a_run_shows_its_latest_step_metrics_and_version() -> None:
    folder = new_run()
    for event in [START, step(1), step(2, **{"train/loss": 0.5})]:
        append_event(folder, event)
    append_event(folder, {"kind": "evaluation", "step": 2, "epoch": 0, "metrics": {"validation/loss": 0.7}})
    folder.model_version.write_text(json.dumps({"name": "digits", "version": 3, "alias": "candidate"}))
    facts = show_run("run-1")
    assert (facts["name"], facts["step"], facts["num_total_steps"], facts["version"]) == ("job", 2, 8, "digits/3")
    assert facts["metrics"] == {"train/loss": 0.5, "validation/loss": 0.7}
    assert facts["mlflow_run_id"] is None


def test_runs_are_listed_newest_first_and_what_is_no_run_is_not() -> None:
    for run_id, time_s in (("late", 20.0), ("early", 10.0)):
        append_event(new_run(run_id), {**START, "time_s": time_s})
    (run_folder("late").path.parent / "stray").mkdir()
    assert [facts["run_id"] for facts in list_runs()] == ["late", "early"]


def test_an_unknown_run_names_the_nearest() -> None:
    new_run("digits-0001")
    with pytest.raises(InputError, match="Did you mean 'digits-0001'"):
        show_run("digits-001")


def test_without_any_run_the_list_is_empty() -> None:
    assert list_runs() == []


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "values",
    [
        {"password": "hunter2"},
        {"db_password": 12345},
        {"apiKey": "hunter2"},
        {"HF_TOKEN": "hunter2"},
        {"aws_secret_access_key": "hunter2"},
        {"credentials": {"user": "a", "pin": "hunter2"}},
        {"data": {"uri": "postgresql://me:hunter2@db/x"}},
        {"places": ["s3://bucket", "https://me:hunter2@host/path"]},
    ],
)
def test_secrets_are_hidden_wherever_they_stand(values: dict[str, Any]) -> None:
    shown = json.dumps(redact(values))
    assert "***" in shown
    assert "hunter2" not in shown
    assert "12345" not in shown


def test_what_only_sounds_secret_is_kept() -> None:
    values = {
        "max_tokens": 128,
        "tokenizer": "words",
        "key_width": 64,
        "pad_token": 0,
        "monkey": "yes",
        "password": None,
        "uri": "https://host:8080/path@2",
        "lr": 0.1,
    }
    assert redact(values) == values


def test_redact_leaves_its_argument_alone() -> None:
    values = {"deep": {"token": "hunter2"}}
    redact(values)
    assert values == {"deep": {"token": "hunter2"}}


def test_the_environment_holds_versions_and_no_secret_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["raymill", "train", "--set", "data.password=hunter2", "--token", "hunter2", "--workers", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("CANARY", "hunter3")
    record = environment()
    assert record["command"][4:] == ["--token", "***", "--workers", "2"]
    assert record["versions"]["torch"]
    text = json.dumps(record)
    assert "hunter" not in text


def test_the_environment_is_taken_without_git_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    record = environment()
    assert (record["git_commit"], record["git_dirty"]) == (None, None)


def test_the_store_is_a_file_unless_the_environment_names_one(state_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri() == f"sqlite:///{state_folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri() == "http://127.0.0.1:5000"


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


def opened(folder: RunFolder, store: FlakyStore) -> mlflow_sync.Delivery:
    folder.delivery.write_text(json.dumps({"mlflow_run_id": "m1", "status": "RUNNING"}))
    return mlflow_sync.Delivery(folder, lambda: store)  # type: ignore[arg-type,return-value]


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


def test_a_secret_in_an_event_is_not_sent_and_unknown_events_are_passed_over() -> None:
    folder = new_run()
    store = FlakyStore(lambda call: "")
    append_event(folder, {"kind": "first_step", "step": 1})
    append_event(folder, {"kind": "checkpoint", "step": 1, "path": "https://me:hunter2@host/x", "best": False})
    assert opened(folder, store).deliver() == 2
    assert store.tags == {"raymill.checkpoint.directory.last": "***"}


# ---------------------------------------------------------------- pictures


def test_pictures_of_curves_and_of_square_totals_are_png_files(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = [step(number) for number in range(3)]
    totals = {"validation/confusion": [[3, 1], [0, 4]], "validation/seen": [1, 2, 3], "validation/wide": [[1, 2, 3]]}
    events.append({"kind": "evaluation", "step": 2, "metrics": {"validation/loss": 0.1}, "totals": totals})
    plots.draw(events, tmp_path)
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["curves.png", "validation_confusion.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_a_confusion_matrix_with_an_empty_class_and_one_with_many_classes_are_drawn(tmp_path: Path) -> None:
    for num_classes in (3, 50):
        plots.confusion_matrix([[0] * num_classes] * num_classes, tmp_path / f"{num_classes}.png", "empty")
    assert len(list(tmp_path.glob("*.png"))) == 2
