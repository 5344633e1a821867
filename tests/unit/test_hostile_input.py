"""Damaged files, huge numbers and odd text: each is answered in words, at once, and hides nothing else."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from raymill import api
from raymill.cli.app import app
from raymill.config.plan import ClusterFacts
from raymill.errors import InputError, RunError, did_you_mean
from raymill.files import run_lock, write_record
from raymill.orchestration.prepare import prepare_resume
from raymill.record import store
from raymill.record.catalog import find_run, list_runs, show_run
from raymill.record.events import (
    AttemptStarted,
    EvaluationDone,
    Event,
    RunFinished,
    RunStopped,
    StepDone,
    append_event,
)
from raymill.record.folder import RunFolder, run_folder
from raymill.tracking import mlflow_client, mlflow_sync, plots

START = AttemptStarted(attempt=1, num_workers=2, step=0, num_total_steps=8, resumed=False)
FACTS = ClusterFacts(num_cpus=4, num_gpus=0, memory_bytes=2**33)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def refused(*arguments: str) -> list[dict[str, str]]:
    """The problems of a command that ends with 2 and no traceback."""
    result = command(*arguments, "--json")
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    problems: list[dict[str, str]] = json.loads(result.stdout)["problems"]
    assert problems
    return problems


def new_run(run_id: str = "run-1", *events: Event) -> RunFolder:
    folder = run_folder(run_id)
    for event in events or (START,):
        append_event(folder, event)
    write_record(folder.spec, {"name": "job"})
    return folder


# ---------------------------------------------------------------- damaged runs


def spoil(folder: RunFolder, how: str) -> None:
    spec = folder.spec
    if how == "gone":
        spec.unlink()
    else:
        spec.write_text(
            {"torn": '{"format_version": 1, "na', "a list": "[1]", "nameless": '{"format_version": 1}', "deep": "[" * 10**5}[how]
        )


@pytest.mark.parametrize("how", ["gone", "torn", "a list", "nameless", "deep"])
def test_a_damaged_run_is_listed_as_that_hides_no_other_and_is_not_resumed(how: str) -> None:
    new_run("whole")
    spoil(new_run("damaged"), how)
    statuses = {facts["run_id"]: facts["status"] for facts in list_runs()}
    assert statuses == {"whole": "running", "damaged": "damaged"}
    assert show_run("damaged")["message"]
    result = command("runs", "list")
    assert (result.exit_code, "damaged" in result.stdout) == (0, True)
    with pytest.raises(InputError, match="Start a new run"):
        prepare_resume("damaged", None, FACTS)


def test_a_run_whose_spec_is_no_job_is_not_resumed() -> None:
    new_run("run-1")
    with pytest.raises(InputError, match="records that cannot be read"):
        prepare_resume("run-1", 2, FACTS)


@pytest.mark.parametrize("message", ["see [/data/x] and [red]", "\x1b[2Jgone", ":warning: [bold"])
def test_a_message_is_shown_as_it_is_and_steers_no_terminal(message: str) -> None:
    new_run("run-1", START, RunStopped(reason="failed", message=message))
    result = command("runs", "show", "run-1")
    assert result.exit_code == 0, result.output
    assert message.replace("\x1b", "") in result.stdout
    assert "\x1b" not in result.stdout


def test_the_names_of_metrics_are_no_markup_either() -> None:
    metrics = {"[/x]": 1.0, "\x1b]0;title\x07": 2.0}
    new_run("run-1", START, StepDone(step=1, epoch=0, rows=1, metrics=metrics))
    result = command("runs", "list")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("run_id", ["../x", "..", "a/../../x", "/etc", "", "x\0y", "a b", "a" * 5000])
def test_what_is_no_plain_name_is_no_run(run_id: str) -> None:
    outside = run_folder("x").path.parent.parent / "x"
    outside.mkdir(parents=True)
    write_record(outside / "summary.json", {"secret": 1})
    with pytest.raises(InputError):
        run_folder(run_id)
    with pytest.raises(InputError):
        find_run(run_id)
    with pytest.raises(InputError):
        _ = api.Run(run_id).summary


def test_damaged_lines_of_events_are_counted_and_the_next_attempt_is_told() -> None:
    folder = new_run("run-1")
    assert "damaged_lines" not in show_run("run-1")
    with folder.events.open("a") as file:
        file.write("@@@ no JSON\n")
        file.write("[" * 100_000 + "\n")
    append_event(folder, StepDone(step=1, epoch=0, rows=1, metrics={}))
    with folder.events.open("a") as file:
        file.write('{"format_ver')
    assert show_run("run-1")["damaged_lines"] == 3
    assert show_run("run-1")["step"] == 1
    assert any("3 damaged lines" in note for note in store.begin_attempt(folder).notes)


# ---------------------------------------------------------------- processes


def test_a_pid_that_another_process_has_now_keeps_no_run_running() -> None:
    started_s = psutil.Process().create_time()
    for at_s, status in ((started_s, "running"), (started_s - 1000, "interrupted"), (None, "running")):
        again = START.model_copy(update={"pid": os.getpid(), "process_started_s": at_s})
        folder = run_folder(f"run-{status}-{at_s is None}")
        new_run(folder.run_id, again)
        assert show_run(folder.run_id)["status"] == status
        done = mlflow_sync.Delivered(driver_pid=os.getpid(), driver_started_s=at_s)
        assert mlflow_sync._driver_is_gone(done, parent=-1) == (status == "interrupted")


# ---------------------------------------------------------------- huge numbers

HUGE = 9223372036854775807


@pytest.mark.parametrize(
    "field",
    [
        "loop.global_batch_rows",
        "loop.epochs",
        "loop.window_rows",
        "loop.shards",
        "loop.gradient_accumulation_steps",
        "loop.threads",
        "scale.workers",
    ],
)
def test_a_huge_number_is_refused_at_once_with_the_limit(field: str) -> None:
    began_s = time.monotonic()
    (problem,) = refused("plan", "smoke", "--set", f"{field}={HUGE}")
    assert time.monotonic() - began_s < 20
    assert "less than or equal to" in problem["expected"]


def test_the_largest_batch_is_planned_at_once() -> None:
    began_s = time.monotonic()
    (problem,) = refused("plan", "smoke", "--set", f"loop.global_batch_rows={2**31 - 1}", "--set", "scale.workers=2")
    assert time.monotonic() - began_s < 20
    assert "Use 1 workers" in problem["fix"]


# ---------------------------------------------------------------- odd overrides and places


@pytest.mark.parametrize(
    "override",
    [
        f"data.{'a.' * 1500}b=1",
        f"schedule.{'9' * 5000}.kind=x",
        "data.num_rows=\0",
        'data.num_rows="\\0"',
        'data.num_rows="\\ud800"',
        'data={"\\0": 1}',
        "data.\0=1",
        "data.num_rows=\udcff",
        "\udcff=1",
        "x" * 10_000,
    ],
)
def test_an_odd_override_is_a_problem(override: str) -> None:
    overrides = ["--set", "schedule=[{kind: StepLR, step_size: 1}]"] if override.startswith("schedule") else []
    assert all(len(problem["where"]) < 500 for problem in refused("check", "smoke", *overrides, "--set", override))


@pytest.mark.parametrize("root", ["x" * 300, "y" * 100_000])
def test_a_folder_of_data_whose_name_is_too_long_is_a_problem(root: str) -> None:
    found = refused("check", "mnist", "--set", f"data.root={root}")
    assert all(len(problem["where"]) < 500 for problem in found)


@pytest.mark.parametrize(
    "arguments", [["check", "j" * 300], ["check", "j" * 50_000], ["check", "\udcff"], ["runs", "show", "r" * 300]]
)
def test_a_name_that_is_too_long_or_no_text_is_a_problem(arguments: list[str]) -> None:
    refused(*arguments)


def test_a_project_whose_name_is_too_long_is_a_problem(tmp_path: Path) -> None:
    refused("init", str(tmp_path / ("p" * 300)))


@pytest.mark.parametrize("place", ["/proc/nope", "/dev/null/x", "/tmp/" + "h" * 300])
def test_a_state_folder_that_cannot_be_made_is_a_problem(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMILL_HOME", place)
    refused("train", "smoke", "--in-process")
    for verb in ("runs", "models"):
        result = command(verb, "list", "--json")
        assert "Traceback" not in result.stderr
        assert result.exit_code in (0, 2)


# ---------------------------------------------------------------- private state


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_state_folder_and_its_files_are_the_users_alone(state_folder: Path) -> None:
    folder = new_run("run-1")
    for path in (state_folder, folder.path.parent, folder.path):
        assert mode(path) == 0o700, path
    for path in (folder.events, folder.spec):
        assert mode(path) == 0o600, path
    with run_lock(folder.driver_lock):
        assert mode(folder.driver_lock) == 0o600
    with mlflow_client.mlflow_settings():
        mlflow_client.connect()
    assert mode(state_folder / "mlflow.db") == 0o600


def test_a_folder_that_is_there_keeps_its_mode(state_folder: Path) -> None:
    (state_folder / "data").mkdir(parents=True)
    (state_folder / "data").chmod(0o755)
    new_run("run-1")
    assert mode(state_folder / "data") == 0o755


# ---------------------------------------------------------------- pictures


def measured(metrics: dict[str, float], totals: dict[str, Any]) -> list[Event]:
    return [EvaluationDone(step=number, epoch=0, rows=6, metrics=metrics, totals=totals) for number in range(3)]


@pytest.mark.parametrize("total", [[[[1, 2]]], [], 3, [[]], [["a"]], [[None, 1], [1, 1]], "text", {"a": 1}, [[float("nan")]]])
def test_totals_of_any_shape_stop_no_picture(total: Any, tmp_path: Path) -> None:
    plots.draw(measured({"validation/loss": 0.1}, {"odd": total, "good": [[1, 0], [0, 1]]}), tmp_path)
    assert {"curves.png", "good.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", [r"validation/$\cost$", "$", "_hidden", "[red]", "x" * 5000, "a\nb"])
def test_a_metric_of_any_name_is_drawn(name: str, tmp_path: Path) -> None:
    plots.draw(measured({name: 0.1}, {name: [[1, 0], [0, 1]]}), tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_very_many_metrics_points_and_tables_are_drawn_in_bounded_time(tmp_path: Path) -> None:
    metrics = {f"metric-{number}": 0.5 for number in range(300)}
    events = measured(metrics, {f"table-{number:03d}": [[1, 0], [0, 1]] for number in range(100)})
    events += [StepDone(step=number, epoch=0, rows=1, metrics={"a": number % 7}) for number in range(20_000)]
    began_s = time.monotonic()
    plots.draw(events, tmp_path)
    assert time.monotonic() - began_s < 60
    assert len(list(tmp_path.glob("*.png"))) == 1 + plots.MAX_TABLES


class Store:
    """Takes what a finished run sends, and notes the order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: self.log.append(name) or []

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(tags={}))


@pytest.mark.parametrize("registers", [True, False])
def test_pictures_come_after_the_model_and_stop_nothing(registers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_run("run-1")
    write_record(folder.spec, {"name": "job", "register": {"model": "m", "alias": "a"}})
    write_record(folder.delivery, {"mlflow_run_id": "m1", "status": "RUNNING"})
    to = Store()

    def register(folder: RunFolder) -> dict[str, Any]:
        to.log.append("register")
        if not registers:
            raise RunError("no export")
        return {"name": "m", "version": 1, "alias": "a"}

    def fail(*given: object) -> None:
        raise ValueError("matplotlib does not like this")

    monkeypatch.setattr(plots, "curves", fail)
    delivery = mlflow_sync.Delivery(folder, register, lambda: to)  # type: ignore[arg-type,return-value]
    end = RunFinished(best_checkpoint=None, metrics={"a": 0.5})
    append_event(folder, StepDone(step=1, epoch=0, rows=1, metrics={"a": 0.5}))
    if registers:
        delivery._finish(end)
    else:
        with pytest.raises(RunError, match="no export"):
            delivery._finish(end)
    order = ("set_terminated", "register", "log_artifacts", "set_tag")
    assert sorted(order, key=to.log.index) == list(order)


# ---------------------------------------------------------------- suggestions


def test_a_suggestion_does_not_depend_on_capitals() -> None:
    assert did_you_mean("adamw", ["AdamW", "SGD"]) == "Did you mean 'AdamW'?"
    assert did_you_mean("ADAMW", ["AdamW", "SGD"]) == "Did you mean 'AdamW'?"
    assert did_you_mean("Smoke", ["smoke", "mnist"]) == "Did you mean 'smoke'?"


@pytest.mark.parametrize(
    ("given", "meant"), [("lr=1", "optimizer.lr"), ("Epochs=1", "loop.epochs"), ("workers=1", "scale.workers")]
)
def test_a_field_of_a_section_is_suggested_with_its_section(given: str, meant: str) -> None:
    (problem,) = refused("check", "smoke", "--set", given)
    assert f"Did you mean '{meant}'?" in problem["fix"]
