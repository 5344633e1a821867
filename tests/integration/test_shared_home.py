"""What a home goes through that no single run sees: two runs at once, and a clock that is set back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration.commands import TIMEOUT_S, Home, wait_until
from raymill.record.events import read_events
from raymill.record.folder import RunFolder

JOB = ("train", "smoke", "--json", "--in-process", "--set", "checkpoint.every_steps=3", "--set", "register={model: blobs}")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home."""
    return Home(tmp_path / "home")


def test_two_runs_at_once_in_one_home_make_one_store_two_versions_and_the_same_weights(home: Home) -> None:
    ended = [(process, *process.communicate(timeout=TIMEOUT_S)) for process in [home.start(*JOB), home.start(*JOB)]]
    for process, _, stderr in ended:
        assert process.returncode == 0, stderr
    first, second = (json.loads(stdout) for _, stdout, _ in ended)
    assert first["run_id"] != second["run_id"]
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["delivered_to_mlflow"]
    assert second["delivered_to_mlflow"]
    assert {first["model"]["version"], second["model"]["version"]} == {1, 2}

    assert {run["run_id"]: run["status"] for run in home.json("runs", "list", "--json")["runs"]} == {
        first["run_id"]: "finished",
        second["run_id"]: "finished",
    }
    # The alias went to the later version and not back.
    assert home.json("models", "show", "blobs@candidate", "--json")["version"] == 2
    assert home.left_over() == []


def test_a_run_that_goes_on_elsewhere_is_not_gone_on_with_a_second_time(home: Home, tmp_path: Path) -> None:
    slow = {"RAYMILL_FAULT": "step_done:slow:seconds=0.3", "RAYMILL_FAULT_FOLDER": str(tmp_path)}
    process = home.start(*JOB, variables=slow)
    wait_until(lambda: home.step() > 0, process)
    run_id = home.folder().run_id
    code, _, stderr = home.run("train", "--resume", run_id, "--in-process")
    assert code == 1, stderr
    assert f"{run_id} is being trained by process {process.pid}" in stderr
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, stderr
    assert (json.loads(stdout)["status"], json.loads(stdout)["attempts"]) == ("finished", 1)


@pytest.mark.long
def test_a_clock_that_is_set_back_by_an_hour_changes_nothing_but_the_times(home: Home, tmp_path: Path) -> None:
    fault = "before_forward:clock:step=5:seconds=3600,step_done:kill:step=10"
    code, _, stderr = home.run(*JOB, variables={"RAYMILL_FAULT": fault, "RAYMILL_FAULT_FOLDER": str(tmp_path)})
    assert code < 0, stderr
    assert [json.loads(line)["fault"] for line in (tmp_path / "fired.jsonl").read_text().splitlines()] == ["clock", "kill"]
    folder = RunFolder(home.folder().path)
    times_s = [event.time_s for event in read_events(folder.events)[0]]
    assert min(times_s[1:]) < times_s[0], "the clock was not set back"

    resumed = home.json("train", "--json", "--resume", folder.run_id, "--in-process")
    plain = home.json(*JOB)
    assert resumed["weights_sha256"] == plain["weights_sha256"]
    assert resumed["rows"] == plain["rows"]
    assert resumed["delivered_to_mlflow"]
    assert resumed["model"]["version"] == 1
    assert home.json("runs", "show", folder.run_id, "--json")["status"] == "finished"
