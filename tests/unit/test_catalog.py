"""What the files of runs say of them: which there are, how each stands, and its metrics by step."""

from __future__ import annotations

import json
import os

import pytest

from raymill.errors import InputError
from raymill.files import FORMAT_VERSION, write_record
from raymill.record.catalog import data_digest, find_run, finished, history, list_runs, show_run
from raymill.record.events import (
    AttemptStarted,
    CheckpointSaved,
    EvaluationDone,
    Event,
    FirstStepDone,
    RunFinished,
    RunStopped,
    StepDone,
    append_event,
)
from raymill.record.folder import RunFolder, run_folder

START = AttemptStarted(attempt=1, num_workers=2, step=0, num_total_steps=8, resumed=False)

DEAD_PID = 2**22 + 1
"""Above the highest process number that Linux gives out."""


def step(number: int, loss: float = 1.0, epoch: int = 0) -> StepDone:
    return StepDone(time_s=100.0 + number, step=number, epoch=epoch, rows=10 * number, metrics={"train/loss": loss})


def evaluation(number: int, loss: float, epoch: int = 0) -> EvaluationDone:
    metrics = {"validation/loss": loss}
    return EvaluationDone(time_s=200.0 + number, step=number, epoch=epoch, rows=10, metrics=metrics)


def new_run(run_id: str = "run-1", events: list[Event] | None = None) -> RunFolder:
    folder = run_folder(run_id)
    folder.path.mkdir(parents=True)
    write_record(folder.spec, {"name": "job"})
    for event in events or []:
        append_event(folder, event)
    return folder


def again(pid: int) -> AttemptStarted:
    return START.model_copy(update={"attempt": 2, "pid": pid})


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ([], "running"),
        ([RunStopped(reason="interrupted", message="asked to")], "interrupted"),
        ([RunStopped(reason="failed", message="rank 1 died")], "failed"),
        ([RunFinished(best_checkpoint=None, metrics={"validation/accuracy": 0.9})], "finished"),
        ([RunStopped(reason="failed", message=""), again(os.getpid())], "running"),
        ([again(DEAD_PID)], "interrupted"),
    ],
)
def test_a_runs_status_is_what_its_last_events_say(last: list[Event], status: str) -> None:
    new_run(events=[START, step(3), *last])
    assert show_run("run-1")["status"] == status


def test_a_run_that_stopped_says_why_until_it_goes_on() -> None:
    folder = new_run(events=[START, RunStopped(reason="failed", message="rank 1 died")])
    assert show_run("run-1")["message"] == "rank 1 died"
    append_event(folder, again(os.getpid()))
    facts = show_run("run-1")
    assert (facts["message"], facts["attempts"]) == (None, 2)


def test_a_run_is_finished_once_its_summary_and_its_last_event_say_so() -> None:
    """Killed between the two it is gone on with, and says it again; what would register it looks for that event."""
    end = RunFinished(best_checkpoint=None, metrics={})
    folder = new_run(events=[START, step(8)])
    write_record(folder.summary, {"status": "finished"})
    assert finished(folder) is None
    append_event(folder, end)
    assert finished(folder) is not None
    # The next attempt has begun, and its summary is that of the one before.
    append_event(folder, again(os.getpid()))
    assert finished(folder) is None
    append_event(folder, end)
    write_record(folder.summary, {"status": "interrupted"})
    assert finished(folder) is None


def test_a_run_without_events_is_starting() -> None:
    new_run()
    facts = show_run("run-1")
    assert (facts["status"], facts["started_s"], facts["step"], facts["num_total_steps"]) == ("starting", None, 0, None)


def test_a_run_shows_its_latest_step_metrics_and_version() -> None:
    folder = new_run(events=[START, step(1), step(2, 0.5), evaluation(2, 0.7)])
    facts = show_run("run-1")
    assert (facts["mlflow_run_id"], facts["version"]) == (None, None)
    write_record(folder.model_version, {"name": "digits", "version": 3, "alias": "candidate"})
    write_record(folder.delivery, {"mlflow_run_id": "m1"})
    facts = show_run("run-1")
    assert (facts["name"], facts["step"], facts["num_total_steps"], facts["version"]) == ("job", 2, 8, "digits/3")
    assert facts["metrics"] == {"train/loss": 0.5, "validation/loss": 0.7}
    assert (facts["mlflow_run_id"], facts["started_s"]) == ("m1", START.time_s)


def test_runs_are_listed_newest_first_and_what_is_no_run_is_not() -> None:
    for run_id, time_s in (("late", 20.0), ("early", 10.0)):
        new_run(run_id, [START.model_copy(update={"time_s": time_s})])
    (run_folder("late").path.parent / "stray").mkdir()
    assert [facts["run_id"] for facts in list_runs()] == ["late", "early"]


def test_a_run_of_another_version_is_listed_as_damaged_and_hides_no_other() -> None:
    new_run("mine", [START])
    spec = new_run("newer", [START])
    spec.spec.write_text(json.dumps({"format_version": FORMAT_VERSION + 1, "name": "job"}))
    events = new_run("changed", [START])
    with events.events.open("a") as file:
        file.write('{"format_version":1,"kind":"moon"}\n')
    facts = {facts["run_id"]: facts for facts in list_runs()}
    assert {run_id: found["status"] for run_id, found in facts.items()} == {
        "mine": "running",
        "newer": "unreadable",
        "changed": "unreadable",
    }
    assert facts["mine"]["message"] is None
    assert str(spec.spec) in facts["newer"]["message"]
    assert "use that version here too" in facts["newer"]["message"]
    assert str(events.events) in facts["changed"]["message"]


@pytest.mark.parametrize("record", ["spec", "delivery", "model_version"])
def test_a_run_with_a_damaged_record_is_listed_as_damaged_and_hides_no_other(record: str) -> None:
    new_run("mine", [START])
    path = getattr(new_run("damaged", [START]), record)
    path.write_text('{"format_version": 1, "na')
    facts = {facts["run_id"]: facts for facts in list_runs()}
    assert {run_id: found["status"] for run_id, found in facts.items()} == {"mine": "running", "damaged": "damaged"}
    assert str(path) in facts["damaged"]["message"]


def test_an_unknown_run_names_the_nearest() -> None:
    new_run("digits-0001")
    for ask in (show_run, find_run, history):
        with pytest.raises(InputError, match="Did you mean 'digits-0001'"):
            ask("digits-001")
    assert find_run("digits-0001") == run_folder("digits-0001")


@pytest.mark.parametrize("run_id", ["", ".", "..", "../runs/digits-0001", "digits-0001/"])
def test_what_is_no_name_of_a_run_is_not_looked_up_as_a_path(run_id: str) -> None:
    new_run("digits-0001")
    with pytest.raises(InputError, match="the id of a run of this project"):
        find_run(run_id)


def test_a_run_tells_its_best_and_its_last_evaluation_and_how_long_it_took() -> None:
    saved = CheckpointSaved(time_s=213.0, step=1, path="checkpoints/step-1.1", best=True)
    first = START.model_copy(update={"time_s": 200.0})
    later = again(os.getpid()).model_copy(update={"time_s": 1000.0, "step": 1, "num_workers": 3})
    end = RunFinished(time_s=1007.5, best_checkpoint="checkpoints/step-1.1", metrics={"validation/loss": 0.1})
    new_run(events=[first, evaluation(1, 0.1), saved, later, evaluation(2, 0.2).model_copy(update={"time_s": 1005.0}), end])
    facts = show_run("run-1")
    assert (facts["duration_s"], facts["num_workers"]) == (13.0 + 7.5, 3)
    assert [(entry["step"], entry["best"]) for entry in facts["evaluations"]] == [(1, True), (2, False)]
    assert (facts["best"], facts["last"]) == tuple(facts["evaluations"])
    assert "evaluations" not in list_runs()[0]


def test_without_any_run_the_list_is_empty() -> None:
    assert list_runs() == []


# ---------------------------------------------------------------- history


def test_training_and_evaluation_at_one_step_share_an_entry() -> None:
    new_run(events=[START, FirstStepDone(step=1), step(1, 3.0), step(2, 2.0), evaluation(2, 2.5), step(3, 1.0, epoch=1)])
    assert history("run-1") == [
        {"step": 1, "epoch": 0, "time_s": 101.0, "train/loss": 3.0},
        {"step": 2, "epoch": 0, "time_s": 102.0, "train/loss": 2.0, "validation/loss": 2.5},
        {"step": 3, "epoch": 1, "time_s": 103.0, "train/loss": 1.0},
    ]


def test_a_step_that_was_trained_again_is_there_once_in_its_place() -> None:
    repeated = [step(1), step(2), step(3), again(os.getpid()), step(2), step(3), step(4)]
    new_run(events=[START, *repeated])
    assert [entry["step"] for entry in history("run-1")] == [1, 2, 3, 4]


def test_the_final_metrics_are_no_step_of_their_own() -> None:
    new_run(events=[START, step(1), RunFinished(best_checkpoint=None, metrics={"validation/loss": 0.1})])
    assert [entry["step"] for entry in history("run-1")] == [1]


# ---------------------------------------------------------------- its input


def test_the_digest_of_a_runs_input_is_that_of_its_manifest() -> None:
    folder = new_run()
    write_record(folder.data_manifest, {"digest": "ab12", "splits": {}})
    assert data_digest(folder) == "ab12"
