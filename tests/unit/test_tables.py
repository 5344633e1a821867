"""What people are shown: ids whole in any width, dates and durations, metrics in short, and what to do after a failure."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from raymill.cli.app import app
from raymill.cli.jobs import _show_summary
from raymill.cli.output import Aligned, duration, in_words, moment, show_table, show_values
from raymill.errors import Interrupted, RunError
from raymill.files import write_record
from raymill.models import registry
from raymill.orchestration import run as runner
from raymill.orchestration.executors import CLUSTER, IN_PROCESS, SUPERVISED, Executor
from raymill.record.events import AttemptStarted, CheckpointSaved, EvaluationDone, RunFinished, StepDone, append_event
from raymill.record.folder import RunFolder, run_folder

RUN = "segmentation-of-large-pictures-20261125-024435-56b260"
DIGEST = "960102ecc56f2edfae0f7790712c76c2739c3f9a6c635198fb26cc02b20895de"
START_S = 1_800_000_000.0


@pytest.fixture(autouse=True)
def zone() -> Iterator[None]:
    """The reader is five hours east of Greenwich."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Somewhere-5")
        time.tzset()
        yield
    time.tzset()


def shown(show: Any, *arguments: Any, width: int = 80) -> list[str]:
    """The lines of a pipe of this width."""
    file = io.StringIO()
    show(Console(file=file, width=width, markup=False, emoji=False, highlight=False), *arguments)
    return file.getvalue().splitlines()


def run_of_two_epochs() -> None:
    folder = run_folder(RUN)
    folder.path.mkdir(parents=True)
    write_record(folder.spec, {"name": "segmentation", "checkpoint": {"metric": "validation/iou"}})
    start = AttemptStarted(time_s=START_S, attempt=1, num_workers=2, step=0, num_total_steps=20, resumed=False)
    events: list[Any] = [start, StepDone(time_s=START_S + 9, step=10, epoch=0, rows=1, metrics={"train/loss": 0.123456})]
    for epoch, iou in enumerate((0.75, 0.5)):
        step, metrics = 10 * (epoch + 1), {"validation/accuracy": 0.9, "validation/iou": iou}
        events.append(EvaluationDone(time_s=START_S + 10 * step, step=step, epoch=epoch, rows=9, metrics=metrics))
        events.append(CheckpointSaved(time_s=START_S + 10 * step, step=step, path="checkpoints/x", best=epoch == 0))
    events.append(RunFinished(time_s=START_S + 200, best_checkpoint="checkpoints/x", metrics={"validation/iou": 0.75}))
    for event in events:
        append_event(folder, event)


# ---------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "-"),
        ({}, "-"),
        (True, "yes"),
        (0.123456789, "0.1235"),
        (1234567, "1234567"),
        ([1, 2], "1, 2"),
        ({"candidate": 3, "best": 2}, "candidate 3  best 2"),
        ("a [bold]", "a [bold]"),
    ],
)
def test_a_value_is_said_in_short_words(value: object, words: str) -> None:
    assert in_words(value) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, None), (0.25, "0.25 s"), (12.34, "12.3 s"), (59.9, "59.9 s"), (200, "3 min 20 s"), (7500.4, "2 h 05 min")],
)
def test_a_duration_is_said_in_two_units_at_most(seconds: float | None, words: str | None) -> None:
    assert duration(seconds) == words


def test_a_moment_is_the_readers_own_date_and_time_of_day() -> None:
    assert moment(START_S) == "2027-01-15 13:00:00"
    assert moment(None) is None


def test_a_table_is_aligned_never_wrapped_or_cut_and_one_line_a_row() -> None:
    lines = shown(show_table, ("id", "about"), [(DIGEST * 3, "two\nlines"), ("b", "[red]x\x1b[1m")])
    width = len(DIGEST) * 3
    assert lines == ["id" + " " * width + "about", f"{DIGEST * 3}  two lines", "b" + " " * (width + 1) + "[red]x[1m"]
    assert shown(show_values, {"weights": DIGEST, "n": 1}, width=20) == [f"weights  {DIGEST}", "n        1"]
    assert shown(lambda console: console.print(Aligned("a", "b"), soft_wrap=True)) == ["a  b"]


# ---------------------------------------------------------------- runs


def test_the_list_of_runs_has_whole_ids_dates_and_the_telling_metric() -> None:
    run_of_two_epochs()
    header, line = CliRunner().invoke(app, ["runs", "list"]).stdout.splitlines()
    assert header.split() == ["run", "status", "started", "took", "workers", "step", "metric", "last", "best"]
    assert line.split("  ")[0] == RUN
    assert line.removeprefix(RUN).split() == [
        *("finished", "2027-01-15", "13:00:00", "3", "min", "20", "s", "2", "20/20", "validation/iou", "0.5", "0.75")
    ]


def test_a_run_is_shown_with_the_history_of_its_validation_the_best_marked() -> None:
    run_of_two_epochs()
    lines = CliRunner().invoke(app, ["runs", "show", RUN]).stdout.splitlines()
    values = dict(line.split("  ", 1) for line in lines[: lines.index("")])
    assert values["run"].strip() == RUN
    assert values["started"].strip() == "2027-01-15 13:00:00"
    assert values["last validation/iou"].strip() == "0.5"
    assert lines[-3:] == [
        "epoch  step  validation/iou  validation/accuracy",
        "0      10    0.75            0.9                  best",
        "1      20    0.5             0.9",
    ]
    assert "{" not in "".join(lines)


SUMMARY: dict[str, Any] = {
    "run_id": RUN,
    "status": "finished",
    "steps": 20,
    "best_step": 10,
    "metrics": {"validation/iou": 0.75},
    "evaluations": [
        {"epoch": 0, "step": 10, "metrics": {"validation/iou": 0.75}, "best": True},
        {"epoch": 1, "step": 20, "metrics": {"validation/iou": 0.5}, "best": False},
    ],
    "weights_sha256": DIGEST,
    "rows_per_s": 1294.4,
    "seconds_to_first_step": 6.84,
    "rows": {"used": 9},
    "degraded": False,
    "recoveries": [],
    "data_wait_share": 0.1,
    "evaluation_wait_share": 0.0,
    "code_changed": [],
}


def test_the_summary_has_whole_ids_and_the_history_of_the_validation() -> None:
    lines = shown(_show_summary, SUMMARY)
    assert f"weights SHA-256    {DIGEST}" in lines
    assert f"run                {RUN}" in lines
    start = lines.index("epoch  step  validation/iou")
    assert lines[start + 1 : start + 3] == ["0      10    0.75            best", "1      20    0.5"]


# ---------------------------------------------------------------- models


def test_models_are_listed_and_shown_with_dates_and_whole_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {"name": "digits", "aliases": {"candidate": 3}, "versions": [3, 2, 1], "updated_s": START_S}
    monkeypatch.setattr(registry, "list_models", lambda: [listed])
    header, line = CliRunner().invoke(app, ["models", "list"]).stdout.splitlines()
    assert header.split("  ")[0] == "model"
    assert line.split() == ["digits", "3", "candidate", "3", "2027-01-15", "13:00:00"]
    version = {"name": "digits", "version": 3, "aliases": ["candidate"], "run_id": RUN, "metrics": {"validation/iou": 0.123456}}
    found = version | {"weights_sha256": DIGEST, "data_digest": DIGEST, "code_digest": DIGEST, "code": None, "created_s": START_S}
    found |= {
        "takes": "image bytes",
        "gives": "boxes float32 of shape (None, None)",
        "exported": False,
        "not_exported": "branches",
    }
    monkeypatch.setattr(registry, "show_model", lambda reference: found)
    lines = CliRunner().invoke(app, ["models", "show", "digits/3"]).stdout.splitlines()
    assert f"weights SHA-256  {DIGEST}" in lines
    assert "made             2027-01-15 13:00:00" in lines
    assert "validation/iou   0.1235" in lines
    assert "takes            image bytes" in lines
    assert "exported         no: branches" in lines


# ---------------------------------------------------------------- what a failure says


def failing(executor: Executor, error: Exception) -> Executor:
    def execute(*arguments: Any) -> dict[str, Any]:
        raise error

    return replace(executor, execute=execute)


def notes_of(executor: Executor, error: Exception, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    folder.path.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(runner, "write_record", lambda path, values: None)
    monkeypatch.setattr(runner.load, "resolved", lambda spec: {})
    plan = type("Plan", (), {"as_record": lambda self: {}})()
    prepared: Any = type("Prepared", (), {"spec": None, "code": {}, "plan": plan})()
    with pytest.raises(type(error)) as caught:
        runner._execute(folder, prepared, failing(executor, error), lambda folder: lambda event: None, 0.0, preflight=False)
    return list(getattr(caught.value, "__notes__", []))


@pytest.mark.parametrize("executor", [SUPERVISED, CLUSTER, IN_PROCESS], ids=lambda executor: executor.name)
def test_a_failed_run_says_its_id_how_to_look_and_how_to_go_on(
    executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "runs" / RUN)
    (note,) = notes_of(executor, RunError("rank 1 died"), folder, monkeypatch)
    lines = [line.strip() for line in note.splitlines()]
    assert f"raymill runs show {RUN}" in lines
    assert f"raymill train --resume {RUN}{' --in-process' if executor is IN_PROCESS else ''}" in lines
    assert (str(folder.ray_log) in note) is (executor is not IN_PROCESS)


def test_an_error_of_the_jobs_code_says_so_too_and_an_interruption_says_it_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "runs" / RUN)
    (note,) = notes_of(IN_PROCESS, ZeroDivisionError("division by zero"), folder, monkeypatch)
    assert RUN in note
    assert notes_of(SUPERVISED, Interrupted(RUN, 7), folder, monkeypatch) == []


@pytest.mark.parametrize("error", [RunError("it broke"), ZeroDivisionError("it broke")])
def test_the_command_prints_the_notes_of_an_error_once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    error.add_note("Next:\n  look there")

    def fail() -> None:
        raise error

    monkeypatch.setattr(registry, "list_models", fail)
    result = CliRunner().invoke(app, ["models", "list", "--json"])
    assert result.exit_code == 1
    assert f"{type(error).__name__}: it broke\n" in result.stderr
    assert result.stderr.endswith("\nNext:\n  look there\n")
    assert result.stderr.count("look there") == 1
    assert '"notes": [\n  "Next:\\n  look there"\n ]' in result.stdout
