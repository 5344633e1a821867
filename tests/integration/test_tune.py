"""Searches: killed anywhere they end as if nothing had been; what is wrong is refused before anything starts."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from integration.commands import Home, wait_until
from raymill.checkpoint.directory import read_state
from raymill.files import read_record
from raymill.record.folder import RunFolder
from raymill.tune.folder import StudyFolder
from raymill.tune.outcome import open_study
from raymill.tune.study import facts_of

pytestmark = pytest.mark.integration

SEARCH = {
    "space": {
        "optimizer.lr": {"kind": "loguniform", "low": 1e-3, "high": 0.2},
        "model.hidden": {"kind": "choice", "values": [8, 16]},
        "optimizer.momentum": {"kind": "uniform", "low": 0.0, "high": 0.95, "when": {"model.hidden": 16}},
    },
    "trials": 8,
    "workers": 1,
    "parallel": 1,
    "sampler": {"kind": "random"},
    "metric": "validation/loss",
    "mode": "min",
}


def command(search: dict[str, Any] = SEARCH, *more: str) -> list[str]:
    return ["tune", "smoke", "--json", "--set", f"search={json.dumps(search)}", "--set", "checkpoint.every_steps=3", *more]


def study_of(home: Home) -> StudyFolder:
    (path,) = (home.path / "studies").iterdir()
    return StudyFolder(path)


def num_over(home: Home) -> int:
    files = list((home.path / "studies").glob("*/trials.jsonl"))
    return len(files[0].read_text().splitlines()) if files else 0


def told(home: Home) -> list[Any]:
    """What stands in the study: number, state, values, value and weights of each trial."""
    found = []
    for trial in map(facts_of, open_study(study_of(home)).trials()):
        weights = [read_record(RunFolder(home.path / "runs" / run).summary)["weights_sha256"] for run in trial["runs"]]
        found.append((trial["number"], trial["state"], trial["values"], trial["value"], weights))
    return found


def process_of(home: Home, what: str) -> psutil.Process | None:
    """A process of the study's driver: itself, or one of its descendants by its command line."""
    for process in psutil.process_iter():
        try:
            if "raymill.tune.driver" not in process.cmdline() or process.environ().get("RAYMILL_HOME") != str(home.path):
                continue
            if what == "driver":
                return process
            return next((one for one in process.children(recursive=True) if what in " ".join(one.cmdline())), None)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return None


def kill(home: Home, what: str) -> Callable[[], bool]:
    def killed() -> bool:
        process = process_of(home, what)
        if process is not None:
            process.kill()
        return process is not None

    return killed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    home = Home(tmp_path_factory.mktemp("undisturbed"))
    summary = home.json(*command())
    assert summary["trials"] == {"complete": 8}
    assert not home.left_over()
    return told(home)


def test_killed_anywhere_it_ends_as_if_nothing_had_been(undisturbed: list[Any], tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    # A trial's process dies in the middle of a trial, each part of the search once while others wait.
    variables = {
        "RAYMILL_FAULT": "step_done:kill:step=7,step_done:delay:step=13:seconds=1",
        "RAYMILL_FAULT_FOLDER": str(tmp_path),
    }
    begun = home.start(*command(), variables=variables)
    for count, what in ((1, "driver"), (3, "raylet")):
        wait_until(lambda count=count: num_over(home) >= count, begun)  # type: ignore[misc]
        wait_until(kill(home, what), begun)
    wait_until(lambda: num_over(home) >= 5, begun)
    begun.kill()
    begun.communicate()
    code, stdout, stderr = home.run(*command())
    assert code == 0, stderr
    assert "going on with what was begun" in stderr
    assert told(home) == undisturbed
    assert [number for number, *_ in undisturbed] == list(range(8))
    assert json.loads(stdout)["delivered_to_mlflow"]
    assert not home.left_over()


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        {
            "sampler": {"kind": "ray.tune.search.optuna:OptunaSearch", "args": {"seed": 2}},
            "limits": {"validation/accuracy": {"least": 0.95}},
        },
        {"sampler": {"kind": "tpe", "startup_trials": 3}, "also": {"validation/accuracy": "max"}},
    ],
    ids=["a searcher of Ray Tune, a limit", "two metrics"],
)
def test_a_searcher_of_others_and_several_metrics_survive_a_killed_driver(more: dict[str, Any], tmp_path: Path) -> None:
    search = {**SEARCH, **more, "trials": 6}
    whole, home = Home(tmp_path / "whole"), Home(tmp_path / "killed")
    summary = whole.json(*command(search))
    begun = home.start(*command(search))
    wait_until(lambda: num_over(home) >= 3, begun)
    wait_until(kill(home, "driver"), begun)
    stdout, stderr = begun.communicate(timeout=240)
    assert begun.returncode == 0, stderr
    assert told(home) == told(whole)
    again = json.loads(stdout)
    assert again["best"]["number"] == summary["best"]["number"]
    accuracies = {one["number"]: one["metrics"]["validation/accuracy"] for one in (*summary["top"], *summary["front"])}
    if "limits" in more:
        assert summary["best"]["inside"]
        assert summary["outside"] == sum(
            facts_of(one)["metrics"]["validation/accuracy"] < 0.95 for one in open_study(study_of(whole)).trials()
        )
    else:
        assert [one["number"] for one in summary["front"]] == [one["number"] for one in again["front"]]
        assert accuracies[summary["front"][-1]["number"]] == max(accuracies.values())
        assert (home.path / "studies" / again["study"] / "pictures" / "front.png").exists()


def test_interrupted_and_locked_out_and_left_alone_the_same_command_goes_on_each_time(
    undisturbed: list[Any], tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    begun = home.start(*command())
    wait_until(lambda: num_over(home) >= 1, begun)
    begun.send_signal(signal.SIGINT)
    stdout, _ = begun.communicate(timeout=120)
    assert begun.returncode == 3
    assert "The same command goes on" in json.loads(stdout)["message"]
    reached = num_over(home)
    assert 1 <= reached < 4

    # Somebody holds the store.
    begun = home.start(*command())
    wait_until(lambda: num_over(home) > reached, begun)
    held = sqlite3.connect(study_of(home).store, isolation_level=None)
    wait_until(lambda: takes(held), begun)
    _, stderr = begun.communicate()
    held.close()
    assert begun.returncode == 1
    assert str(study_of(home).store) in stderr.replace("\n", "")
    assert "database is locked" in stderr
    reached = num_over(home)
    assert reached < 7

    # The command is dead, its driver ends the search.
    begun = home.start(*command())
    wait_until(lambda: num_over(home) > reached, begun)
    driver = process_of(home, "driver")
    assert driver is not None
    begun.kill()
    begun.communicate()
    driver.wait(120)
    assert study_of(home).summary.exists()
    code, stdout, stderr = home.run(*command())
    assert code == 0, stderr
    assert "going on with what was begun" in stderr
    assert json.loads(stdout)["delivered_to_mlflow"]
    assert told(home) == undisturbed
    assert not home.left_over()


def takes(held: sqlite3.Connection) -> bool:
    """Whether a connection gets its database for itself alone."""
    try:
        held.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        return False
    return True


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(undisturbed: list[Any], seed: int, tmp_path: Path) -> None:
    home, draw = Home(tmp_path / "home"), random.Random(seed)
    # Each trial takes a second, so that most moments are in the middle of one.
    variables = {"RAYMILL_FAULT": "step_done:slow:seconds=0.05", "RAYMILL_FAULT_FOLDER": str(tmp_path)}
    begun, killed = home.start(*command(), variables=variables), 0
    for what in draw.sample(["driver", "raylet", "ray::ImplicitFunc"], 3):
        wait_until(lambda what=what: process_of(home, what) is not None or begun.poll() is not None, begun)  # type: ignore[misc]
        with suppress(subprocess.TimeoutExpired):
            # Where in the search that is, chance decides.
            begun.wait(draw.uniform(0, 6))
        killed += kill(home, what)()
    _, stderr = begun.communicate(timeout=300)
    assert begun.returncode == 0, stderr
    assert killed, "the search was over before anything could be killed"
    assert told(home) == undisturbed
    assert not home.left_over()


def test_a_search_of_ten_mistakes_names_all_and_starts_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    wrong = {
        **SEARCH,
        "space": {
            "optimizer.lrr": {"kind": "uniform", "low": 0.1, "high": 0.2},
            "model.widht": {"kind": "choice", "values": [1]},
            "loop.epochs": {"kind": "uniform", "low": 0.5, "high": 2.5},
            "loop.seed": {"kind": "int", "low": -5, "high": 3},
            "loop.precision": {"kind": "choice", "values": ["fp32", "fp8"]},
            "optimizer.momentum": {"kind": "choice", "values": [0.9, "much"]},
            "loop.global_batch_rows": {"kind": "int", "low": 0, "high": 60},
            "model.hidden": {"kind": "choice", "values": [8], "when": {"nobody": 1}},
        },
        "points": [{"loop.precision": "fp7"}, {"elsewhere": 1}],
    }
    code, stdout, _ = home.run(*command(wrong))
    assert code == 2
    places = {problem["where"] for problem in json.loads(stdout)["problems"]}
    expected = {f"search.space.{name}" for name in wrong["space"]} - {"search.space.model.hidden"}  # type: ignore[attr-defined]
    expected |= {"search.space.model.hidden.when"}
    assert expected | {"search.points.0.loop.precision", "search.points.1.elsewhere"} <= places
    assert not list(home.path.glob("studies/*"))
    assert not list(home.path.glob("runs/*"))


def test_a_trial_that_fails_takes_no_other_along(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    search = {
        **SEARCH,
        "space": {
            "model.hidden": {"kind": "choice", "values": [8, 16]},
            "loop.on_nan": {"kind": "choice", "values": ["stop"]},
            "optimizer.lr": {"kind": "choice", "values": [0.1, 1e30]},
        },
        "sampler": {"kind": "grid"},
        "seeds": 2,
    }
    code, stdout, stderr = home.run(*command(search))
    assert code == 0, stderr
    summary = json.loads(stdout)
    assert summary["trials"] == {"complete": 2, "failed": 2}
    assert summary["best"]["deviation"] > 0
    assert len(summary["best"]["runs"]) == 2
    failed = [trial for trial in map(facts_of, open_study(study_of(home)).trials()) if trial["state"] == "failed"]
    assert {trial["values"]["optimizer.lr"] for trial in failed} == {1e30}
    assert all("Lower optimizer.lr" in trial["message"] for trial in failed)
    rows = home.json("tune", "export", study_of(home).name, "--json")["rows"]
    assert len(rows) == 4


@pytest.mark.long
def test_two_searches_at_once_both_end_and_trials_of_two_workers_find_room(tmp_path: Path) -> None:
    homes = [Home(tmp_path / "one"), Home(tmp_path / "two")]
    wide = {**SEARCH, "trials": 3, "workers": 2, "parallel": None}
    searches = [home.start(*command(search)) for home, search in zip(homes, (SEARCH, wide), strict=True)]
    for process in searches:
        _, stderr = process.communicate(timeout=500)
        assert process.returncode == 0, stderr
    for home, count in zip(homes, (8, 3), strict=True):
        assert [(number, state) for number, state, *_ in told(home)] == [(number, "complete") for number in range(count)]
        assert not home.left_over()


def test_what_ends_early_is_saved_and_a_search_goes_on_with_more_trials(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    search = {**SEARCH, "trials": 7, "parallel": None, "scheduler": {"kind": "asha", "grace": 1, "reduction_factor": 2}}
    longer = ("--set", "loop.epochs=6", "--set", "scale.workers=1")
    summary = home.json(*command(search, *longer))
    assert summary["trials"]["pruned"] >= 1
    assert sum(summary["trials"].values()) == 7
    ended = [trial for trial in map(facts_of, open_study(study_of(home)).trials()) if trial["state"] == "pruned"]
    run = RunFolder(home.path / "runs" / ended[0]["runs"][0])
    # It may be gone on with, as any run that was stopped.
    resumed = home.json("train", "--resume", run.run_id, "--in-process", "--json")
    assert resumed["steps"] == 60
    more = home.json("tune", "--json", "--resume", summary["study"], "--add-trials", "1")
    assert sum(more["trials"].values()) == 8
    in_all = home.json("tune", "--json", "--resume", summary["study"], "--trials", "9")
    assert sum(in_all["trials"].values()) == 9


def test_a_population_goes_on_from_its_best_and_a_killed_one_ends_alike(tmp_path: Path) -> None:
    search = {
        **SEARCH,
        "space": {"optimizer.lr": {"kind": "loguniform", "low": 1e-4, "high": 0.2}},
        "trials": 9,
        "scheduler": {"kind": "pbt", "population": 3, "quantile": 0.34, "grace": 2},
    }
    job = command(search, "--set", "loop.epochs=6")
    whole, killed = Home(tmp_path / "whole"), Home(tmp_path / "killed")
    assert whole.json(*job)["trials"] == {"complete": 9}
    folders = [RunFolder(whole.path / "runs" / trial["runs"][0]) for trial in map(facts_of, open_study(study_of(whole)).trials())]
    begun = [read_record(folder.spec)["init_from"] for folder in folders]
    assert begun[:3] == [None] * 3
    parents = [int(one["model"][-4:]) for one in begun[3:]]
    assert len(set(parents)) < 6, "the worst of a generation goes on from one of the best"
    assert all(number // 3 == parent // 3 + 1 for number, parent in enumerate(parents, 3))
    # The last generation has trained on every row of all six epochs, its forebears' included.
    summaries = [read_record(folder.summary) for folder in folders[6:]]
    assert [summary["rows"]["used"] for summary in summaries] == [6 * 600] * 3

    # The second death is between an evaluation and every save of that step: it has to be evaluated again by who goes on there,
    # and by nobody who goes on from it.
    faults = "step_done:kill:step=33,before_commit:slow:step=40:seconds=1,epoch_end:kill:step=40"
    fault = {"RAYMILL_FAULT": faults, "RAYMILL_FAULT_FOLDER": str(tmp_path)}
    code, _, stderr = killed.run(*job, variables=fault)
    assert code == 0, stderr

    def weights(home: Home) -> list[Any]:
        found = []
        for trial in map(facts_of, open_study(study_of(home)).trials()):
            folder = RunFolder(home.path / "runs" / trial["runs"][0])
            (path, *_) = sorted(folder.checkpoints.glob(f"step-{10 * (2 * (trial['number'] // 3) + 2):08d}.*"), reverse=True)
            weights_sha256 = read_state(path, "weights_sha256")["weights_sha256"]
            found.append((trial["number"], trial["values"], trial["value"], weights_sha256))
        return found

    assert weights(killed) == weights(whole)


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount memory as a disk that is full")
def test_a_full_disk_costs_no_trial(undisturbed: list[Any], tmp_path: Path) -> None:
    place = tmp_path / "home"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount: {mounted.stderr.decode()}")
    try:
        home = Home(place)
        begun = home.start(*command())
        wait_until(lambda: num_over(home) >= 2, begun)
        filler = place / "filler"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(2**16))
                file.flush()
        _, stderr = begun.communicate()
        assert begun.returncode == 1
        assert "disk" in stderr
        assert "he same command goes on" in " ".join(stderr.split())
        filler.unlink()
        code, _, stderr = home.run(*command())
        assert code == 0, stderr
        assert told(home) == undisturbed
        assert not home.left_over()
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
