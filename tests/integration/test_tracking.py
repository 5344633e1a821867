"""Events reach a real MLflow store once each and in order, through kills, locks and restarts."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from raymill.files import read_record, write_record
from raymill.record.catalog import show_run
from raymill.record.events import (
    AttemptStarted,
    CheckpointSaved,
    EvaluationDone,
    EventWriter,
    RunFinished,
    RunStopped,
    StepDone,
    append_event,
)
from raymill.record.folder import RunFolder, run_folder
from raymill.tracking.mlflow_client import connect, experiment_id, mlflow_settings, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

NUM_STEPS = 300
SPEC = {"name": "job", "pipeline": "jobs.a:b", "loop": {"seed": 3}, "data": {"password": "hunter2"}, "register": None}


@pytest.fixture
def folder() -> RunFolder:
    made = run_folder("run-1")
    made.path.mkdir(parents=True)
    write_record(made.spec, SPEC)
    write_record(made.plan, {"num_workers": 2, "reasons": {"num_workers": "given"}})
    write_record(made.data_manifest, {"digest": "d" * 64})
    write_record(made.environment, {"git_commit": "c" * 40, "versions": {"torch": "2.14.1"}, "user": "anna"})
    return made


def start(attempt: int = 1, pid: int | None = None) -> AttemptStarted:
    """The start of an attempt that this process drives, unless another one is named."""
    return AttemptStarted(
        attempt=attempt, num_workers=2, step=0, num_total_steps=NUM_STEPS, resumed=attempt > 1, pid=pid or os.getpid()
    )


def write_steps(folder: RunFolder, first: int, last: int) -> None:
    with EventWriter(folder.events) as writer:
        for step in range(first, last + 1):
            metrics = {"train/loss": 1 / step, "train/learning_rate": 0.1}
            writer.write(StepDone(step=step, epoch=0, rows=step, metrics=metrics))


def write_end(folder: RunFolder) -> None:
    totals = {"validation/confusion": [[5, 1], [2, 4]]}
    metrics = {"validation/accuracy": 0.75}
    append_event(folder, EvaluationDone(step=NUM_STEPS, epoch=0, rows=12, metrics=metrics, totals=totals))
    append_event(folder, RunFinished(best_checkpoint="checkpoints/step-00000300.1", metrics=metrics))


def deliver(folder: RunFolder, *options: str) -> subprocess.Popen[bytes]:
    # Its output goes to a file: MLflow reports a locked store with long tracebacks, which would fill a pipe.
    with folder.tracking_log.open("ab") as output:
        command = [sys.executable, "-m", "raymill.orchestration.tracker", str(folder.path), *options]
        return subprocess.Popen(command, stdout=output, stderr=output)


def deliver_all(folder: RunFolder) -> None:
    assert deliver(folder).wait(timeout=120) == 0, folder.tracking_log.read_text()


@contextlib.contextmanager
def store() -> Iterator[MlflowClient]:
    with mlflow_settings():
        yield connect()


def the_run(run_id: str = "run-1") -> Any:
    with store() as client:
        (run,) = client.search_runs([experiment_id(client, "job")], f"tags.`raymill.run_id` = '{run_id}'")
    return run


def rows(key: str) -> list[tuple[int, float]]:
    """(step, value) of every stored point of a metric, in the order of the steps, repeated ones included."""
    with contextlib.closing(sqlite3.connect(tracking_uri().removeprefix("sqlite:///"))) as opened:
        return opened.execute("select step, value from metrics where key = ? order by step", [key]).fetchall()


def test_a_whole_run_arrives_once_in_order_with_all_that_belongs_to_it(folder: RunFolder) -> None:
    append_event(folder, start())
    write_steps(folder, 1, NUM_STEPS)
    append_event(folder, CheckpointSaved(step=300, path="checkpoints/step-00000300.1", best=True))
    write_end(folder)
    deliver_all(folder)

    assert rows("train/loss") == [(step, 1 / step) for step in range(1, NUM_STEPS + 1)]
    run = the_run()
    with store() as client:
        history = client.get_metric_history(run.info.run_id, "train/learning_rate")
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        drawn = {file.path for file in client.list_artifacts(run.info.run_id, "pictures")}
    assert [point.step for point in history] == list(range(1, NUM_STEPS + 1))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run-1")
    assert run.data.metrics["final/validation/accuracy"] == 0.75
    expected = {"loop.seed": "3", "data.password": "***", "plan.num_workers": "2"}
    assert expected.items() <= run.data.params.items()
    assert run.data.tags["raymill.data_digest"] == "d" * 64
    assert run.data.tags["mlflow.source.git.commit"] == "c" * 40
    assert run.data.tags["raymill.checkpoint.best"] == "checkpoints/step-00000300.1"
    assert run.inputs.dataset_inputs[0].dataset.digest == "d" * 36
    assert files == {"spec.json", "plan.json", "plan.html", "data_manifest.json", "environment.json", "pictures"}
    assert (run.data.tags["mlflow.user"], run.data.tags["mlflow.source.name"]) == ("anna", "raymill train job")
    text = run.data.tags["mlflow.note.content"]
    assert text.startswith("**Finished** at step 300 of 300: validation/accuracy **0.75**")
    assert f"get-artifact?path=pictures/curves.png&run_uuid={run.info.run_id}" in text
    assert not [value for value in run.data.tags.values() if value.startswith(("{", "["))]
    assert drawn == {"pictures/curves.png", "pictures/validation_confusion.png"}
    shown = show_run("run-1")
    assert (shown["status"], shown["mlflow_run_id"]) == ("finished", run.info.run_id)
    for path in folder.path.parent.parent.rglob("*"):
        if path.is_file() and path != folder.spec:
            assert b"hunter2" not in path.read_bytes(), path

    deliver_all(folder)
    assert len(rows("train/loss")) == NUM_STEPS


def test_kills_at_random_moments_lose_and_double_nothing(folder: RunFolder) -> None:
    chance, num_steps = random.Random(7), 10_000
    append_event(folder, start())
    write_steps(folder, 1, num_steps)
    write_end(folder)
    num_rows = []
    for _ in range(5):
        process = deliver(folder)
        # Counted from the first sign of progress, so that kills fall into the work and not into the imports.
        wait_for_change(folder.delivery, process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=chance.uniform(0.0, 0.3))
        process.kill()
        process.wait()
        num_rows.append(len(rows("train/loss")))
    assert num_rows[0] < num_steps
    deliver_all(folder)
    assert rows("train/loss") == [(step, 1 / step) for step in range(1, num_steps + 1)]
    assert len(rows("final/validation/accuracy")) == 1
    assert the_run().info.status == "FINISHED"


def wait_for_change(path: Path, process: subprocess.Popen[bytes]) -> None:
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)


def test_a_store_whose_making_was_killed_is_made_anew(folder: RunFolder) -> None:
    make = "from raymill.tracking.mlflow_client import connect, mlflow_settings\nwith mlflow_settings(): connect()"
    path = folder.path.parent.parent / "mlflow.db"
    with subprocess.Popen([sys.executable, "-c", make], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as maker:
        # Between its first table and its last one.
        while num_tables(path.with_name("mlflow.db.stage")) < 5:
            assert maker.poll() is None
        maker.kill()
    assert not path.exists()
    with store() as client:
        assert client.search_experiments()
    assert num_tables(path) > 20
    assert not path.with_name("mlflow.db.stage").exists()


def num_tables(path: Path) -> int:
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as opened:
        try:
            return len(opened.execute("select name from sqlite_master where type = 'table'").fetchall())
        except sqlite3.OperationalError:
            return 0


@pytest.mark.long
def test_a_locked_store_delays_delivery_and_nothing_else(folder: RunFolder, locked: sqlite3.Connection) -> None:
    append_event(folder, start())
    write_steps(folder, 1, NUM_STEPS)
    write_end(folder)
    process = deliver(folder)
    # MLflow itself waits for the lock first, for 20 s; the lock is held until that has failed once.
    while "next try" not in folder.tracking_log.read_text():
        wait_for_change(folder.tracking_log, process)
    locked.rollback()
    assert process.wait(timeout=120) == 0
    assert rows("train/loss") == [(step, 1 / step) for step in range(1, NUM_STEPS + 1)]


@pytest.fixture
def locked(folder: RunFolder) -> Iterator[sqlite3.Connection]:
    with store():
        pass
    with contextlib.closing(sqlite3.connect(tracking_uri().removeprefix("sqlite:///"), isolation_level=None)) as held:
        held.execute("begin exclusive")
        yield held


def test_once_the_run_is_over_an_unreachable_server_ends_in_exit_code_1_and_the_queue_stays(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_event(folder, start())
    write_steps(folder, 1, 3)
    write_end(folder)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        assert deliver(folder, "--give-up-s", "1").wait(timeout=120) == 1
    why = read_record(folder.tracking_failure)["message"]
    assert "127.0.0.1" in why
    assert f"ERROR {why}" in folder.tracking_log.read_text()
    deliver_all(folder)
    assert not folder.tracking_failure.exists()
    assert len(rows("train/loss")) == 3


def test_a_torn_line_and_repeated_steps_of_a_second_attempt_go_into_the_same_run(folder: RunFolder) -> None:
    append_event(folder, start())
    write_steps(folder, 1, 40)
    with folder.events.open("a") as file:
        file.write('{"kind":"step","step":41,"metr')
    append_event(folder, RunStopped(reason="interrupted", message="asked to"))
    deliver_all(folder)
    assert the_run().info.status == "KILLED"

    append_event(folder, start(attempt=2))
    write_steps(folder, 31, 60)
    append_event(folder, RunStopped(reason="failed", message="rank 1 died"))
    deliver_all(folder)
    run = the_run()
    assert run.info.status == "FAILED"
    assert {"raymill.attempt.1", "raymill.attempt.2"} <= run.data.tags.keys()
    assert run.data.tags["mlflow.note.content"].startswith("**Failed** at step 60 of 300.")
    assert "rank 1 died" in run.data.tags["mlflow.note.content"]
    assert [step for step, _ in rows("train/loss")] == list(range(1, 61))


def test_a_driver_that_died_without_a_word_leaves_a_killed_run(folder: RunFolder) -> None:
    driver = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    append_event(folder, start(pid=driver.pid))
    write_steps(folder, 1, 5)
    process = deliver(folder)
    driver.kill()
    driver.communicate()
    assert process.wait(timeout=120) == 0
    assert the_run().info.status == "KILLED"
    assert [step for step, _ in rows("train/loss")] == [1, 2, 3, 4, 5]


def test_two_runs_that_start_at_once_without_a_store_both_work(folder: RunFolder) -> None:
    other = run_folder("run-2")
    other.path.mkdir()
    write_record(other.spec, SPEC)
    for each in (folder, other):
        append_event(each, start())
        write_steps(each, 1, 10)
        append_event(each, RunStopped(reason="interrupted", message="asked to"))
    processes = [deliver(folder), deliver(other)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert the_run("run-1").info.experiment_id == the_run("run-2").info.experiment_id
    assert len(rows("train/loss")) == 20


def test_an_experiment_is_one_of_training_also_when_it_was_there_before_and_a_child_is_shown_beneath_its_parent(
    folder: RunFolder,
) -> None:
    with store() as client:
        made = client.create_experiment("job", folder.path.with_name("elsewhere").as_uri())
    child = run_folder("run-2")
    child.path.mkdir()
    write_record(child.spec, SPEC)
    write_record(child.environment, {"parent_run_id": "run-1"})
    for each in (folder, child):
        append_event(each, start())
        append_event(each, RunStopped(reason="interrupted", message="asked to"))
        deliver_all(each)
    with store() as client:
        assert client.get_experiment(made).tags["mlflow.experimentKind"] == "custom_model_development"
    assert the_run("run-2").data.tags["mlflow.parentRunId"] == the_run("run-1").info.run_id
    assert "mlflow.parentRunId" not in the_run("run-1").data.tags


def test_the_store_and_its_files_are_in_the_state_folder(folder: RunFolder, state_folder: Path) -> None:
    with store() as client:
        location = client.get_experiment(experiment_id(client, "job")).artifact_location
    assert location == (state_folder / "artifacts" / "job").as_uri()
    assert (state_folder / "mlflow.db").is_file()
