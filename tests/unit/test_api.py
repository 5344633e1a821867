"""The Python door: what `raymill.load` and its like take, what they say, and what importing them costs: next to nothing."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import raymill
from raymill.errors import InputError
from raymill.files import write_record
from raymill.record.events import AttemptStarted, EvaluationDone, RunFinished, StepDone, append_event
from raymill.record.folder import RunFolder, run_folder

PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the catalogue's project, whose packages a check puts on the path."""
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(sys, "path", [*sys.path])


# ---------------------------------------------------------------- what is imported

HEAVY = "sorted({'torch', 'ray', 'mlflow', 'pandas', 'matplotlib', 'IPython'} & set(sys.modules))"


@pytest.mark.parametrize(
    "code",
    [
        "",
        "dir(raymill)",
        "[getattr(raymill, name) for name in raymill.__all__]",
        "raymill.load('smoke').check()",
        "raymill.load('smoke').plan()",
        "raymill.runs()",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    program = f"import raymill, sys\n{code}\nprint({HEAVY})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_importing_the_package_imports_no_other_file_of_it() -> None:
    program = "import raymill, sys; print([name for name in sys.modules if name.startswith('raymill.')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_the_door_shows_all_its_names_and_no_other() -> None:
    assert set(raymill.__all__) <= set(dir(raymill))
    assert all(getattr(raymill, name).__module__ == "raymill.api" for name in raymill.__all__)
    with pytest.raises(AttributeError, match=r"module 'raymill' has no attribute 'lod'; it has Job, Model, Run, load, "):
        _ = raymill.lod


# ---------------------------------------------------------------- jobs


def test_a_job_is_loaded_by_name_folder_or_file() -> None:
    jobs = [raymill.load(name) for name in ("smoke", "jobs/smoke", "jobs/smoke/job.yaml", PROJECT / "jobs" / "smoke")]
    assert {job.spec.name for job in jobs} == {"smoke"}
    assert jobs[0].spec.loop.epochs == 2


def test_overrides_are_fields_with_two_underscores_for_a_dot() -> None:
    job = raymill.load("smoke", loop__epochs=3, scale={"workers": 4}, checkpoint__metric=None, name="other")
    assert (job.spec.loop.epochs, job.spec.scale.workers, job.spec.checkpoint.metric, job.spec.name) == (3, 4, None, "other")
    assert (job.spec.loop.global_batch_rows, job.spec.checkpoint.mode) == (60, "max")
    assert job.plan().total_steps == 30


@pytest.mark.parametrize(
    "value",
    [1e-5, 1e20, 0.1 + 0.2, 3, True, None, "yes", "1", "null", "a: b # c", 'über "x"\n', [1, [2.5, "x"]], {"a": {"b": None}}],
)
def test_a_value_arrives_as_it_was_given(value: Any) -> None:
    found = raymill.load("smoke", model__hidden=value).spec.model["hidden"]
    assert found == value
    assert type(found) is type(value)


def test_a_job_is_checked_against_its_data() -> None:
    assert raymill.load("smoke", data__num_rows=300).check() == {"train": 300, "validation": 60}


def test_a_plan_has_every_number_with_its_reason() -> None:
    plan = raymill.load("smoke").plan()
    assert (plan.num_workers, plan.steps_per_epoch, plan.total_steps) == (2, 10, 20)
    assert plan.reasons["total_steps"] == "2 epochs x 10 steps"


def test_an_unknown_job_leads_to_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'smoke'"):
        raymill.load("smok")


def test_what_is_wrong_with_a_job_is_said_at_once_and_not_before_it_is_asked() -> None:
    job = raymill.load("smoke", loop__epochs=0, scale__workers=7)
    assert (job.spec.loop.epochs, job.spec.scale.workers) == (1, 7)
    for ask in (job.check, job.plan):
        with pytest.raises(InputError) as caught:
            ask()
        assert [problem.where for problem in caught.value.problems] == ["--set loop.epochs", "--set scale.workers"]


def test_more_workers_than_this_process_has_are_refused_before_anything_is_made(state_folder: Path) -> None:
    with pytest.raises(InputError, match=r"--in-process: found scale\.workers=3"):
        raymill.load("smoke", scale__workers=3).train(in_process=True, quiet=True)
    assert not state_folder.exists()


# ---------------------------------------------------------------- runs


@pytest.fixture
def folder() -> RunFolder:
    made = run_folder("smoke-1")
    made.path.mkdir(parents=True)
    write_record(made.spec, {"name": "smoke"})
    append_event(made, AttemptStarted(attempt=1, num_workers=2, step=0, num_total_steps=2, resumed=False, pid=os.getpid()))
    return made


def test_without_runs_there_are_none_and_an_unknown_one_is_refused(folder: RunFolder) -> None:
    assert [run.run_id for run in raymill.runs()] == ["smoke-1"]
    with pytest.raises(InputError, match="Did you mean 'smoke-1'"):
        raymill.run("smoke-2")
    folder.spec.unlink()
    assert [run.status for run in raymill.runs()] == ["damaged"]


def test_a_run_says_what_its_folder_says_now(folder: RunFolder) -> None:
    run = raymill.run("smoke-1")
    assert (run.status, run.metrics, run.summary, run.folder) == ("running", {}, None, folder.path)
    append_event(folder, StepDone(step=1, epoch=0, rows=60, metrics={"train/loss": 1.5}))
    append_event(folder, RunFinished(best_checkpoint=None, metrics={"validation/loss": 0.5}))
    write_record(folder.summary, {"status": "finished"})
    assert (run.status, run.metrics) == ("finished", {"train/loss": 1.5, "validation/loss": 0.5})
    assert run.summary == {"status": "finished"}


def test_the_history_of_a_run_is_a_table_by_step(folder: RunFolder) -> None:
    run = raymill.run("smoke-1")
    empty = run.history()
    assert (len(empty), empty.index.name, list(empty.columns)) == (0, "step", ["epoch", "time_s"])
    for number in (1, 2):
        append_event(folder, StepDone(time_s=number, step=number, epoch=0, rows=60, metrics={"train/loss": 1.0 / number}))
    append_event(folder, EvaluationDone(step=2, epoch=0, rows=60, metrics={"validation/loss": 0.75}))
    table = run.history()
    assert (list(table.index), table.index.name) == ([1, 2], "step")
    assert list(table.columns) == ["epoch", "time_s", "train/loss", "validation/loss"]
    assert list(table["train/loss"]) == [1.0, 0.5]
    assert math.isnan(table["validation/loss"][1])
    assert table["validation/loss"][2] == 0.75
