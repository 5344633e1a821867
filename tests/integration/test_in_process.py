"""Runs in this process: the same rows and weights as one worker on Ray, either going on with the other's runs; a user's own
traceback and debugger; and nothing changed for a caller from Python.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import shared_memory
from integration.commands import PROJECT, TIMEOUT_S, Home, wait_until
from raymill.files import read_record
from raymill.record.events import AttemptStarted, EvaluationDone, Event, StepDone, read_events
from raymill.record.folder import RunFolder

pytestmark = pytest.mark.integration

NUM_STEPS, BATCH_ROWS = 20, 60
JOB = ("smoke", "--json", "--set", "checkpoint.every_steps=3", "--set", "loop.record_order=true")
HERE, ON_RAY = ("--in-process",), ("--workers", "1")
KILL_STEP = 7


@dataclass(frozen=True)
class Trained:
    """A run that is finished."""

    home: Home
    summary: dict[str, Any]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.home.path / "runs" / self.summary["run_id"])

    @property
    def events(self) -> list[Event]:
        return read_events(self.folder.events)[0]

    @property
    def starts(self) -> list[AttemptStarted]:
        return [event for event in self.events if isinstance(event, AttemptStarted)]

    def batches(self) -> dict[int, list[int]]:
        """Position behind each step -> its rows, as the last attempt that took the step had them."""
        lines = (self.folder.path / "order-0.jsonl").read_text().splitlines()
        return {record["position"]: record["rows"] for record in map(json.loads, lines)}

    def last_checkpoint(self) -> dict[str, Any]:
        """Size and SHA-256 of each file of the checkpoint of the last step."""
        (path,) = self.folder.checkpoints.glob(f"step-{NUM_STEPS:08d}.*")
        files: dict[str, Any] = read_record(path / "checksums.json")["files"]
        return files


def train(home: Home, *arguments: str) -> Trained:
    return Trained(home, home.json("train", *arguments))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def here(home: Home) -> Trained:
    """The job in a process of its own, registered."""
    return train(home, *JOB, *HERE, "--set", "register={model: blobs}")


@pytest.fixture(scope="module")
def on_ray(home: Home) -> Trained:
    """The job on one worker."""
    return train(home, *JOB, *ON_RAY)


# ---------------------------------------------------------------- the same run


def test_a_run_in_process_is_the_same_to_the_last_bit_as_one_worker_on_ray(here: Trained, on_ray: Trained) -> None:
    assert here.summary["weights_sha256"] == on_ray.summary["weights_sha256"]
    assert here.summary["best_weights_sha256"] == on_ray.summary["best_weights_sha256"]
    assert here.last_checkpoint() == on_ray.last_checkpoint()
    assert here.batches() == on_ray.batches()
    assert list(here.batches()) == list(range(BATCH_ROWS, NUM_STEPS * BATCH_ROWS + 1, BATCH_ROWS))

    def measured(trained: Trained) -> list[tuple[int, dict[str, float]]]:
        return [(event.step, event.metrics) for event in trained.events if isinstance(event, StepDone | EvaluationDone)]

    assert measured(here) == measured(on_ray)
    for key in ("status", "steps", "rows", "metrics", "last_metrics", "best_step", "num_workers", "attempts", "degraded"):
        assert here.summary[key] == on_ray.summary[key], key


def test_its_folder_holds_what_one_on_ray_holds_but_for_what_belongs_to_other_processes(here: Trained, on_ray: Trained) -> None:
    names = [{path.name for path in trained.folder.path.iterdir()} for trained in (here, on_ray)]
    assert names[1] - names[0] == {"ray.log", "ray-train", "rank-0.json", "stacks-0.txt", "tracking.log"}
    assert names[0] - names[1] == {"model_version.json"}


def test_it_is_delivered_to_mlflow_and_registered_by_the_same_process(here: Trained) -> None:
    assert here.summary["delivered_to_mlflow"] is True
    assert here.summary["model"] == {"name": "blobs", "version": 1, "alias": "candidate"}
    shown = here.home.json("runs", "show", here.summary["run_id"], "--json")
    assert (shown["status"], shown["version"]) == ("finished", "blobs/1")
    assert shown["mlflow_run_id"]
    assert here.home.json("evaluate", "blobs@candidate", "--json")["metrics"] == here.summary["metrics"]


# ---------------------------------------------------------------- killed, and gone on with


@pytest.mark.parametrize(("first", "then"), [(HERE, HERE), (HERE, ON_RAY), pytest.param(ON_RAY, HERE, marks=pytest.mark.long)])
def test_a_killed_run_goes_on_here_or_on_ray_and_ends_with_the_same_weights(
    first: tuple[str, ...], then: tuple[str, ...], here: Trained, tmp_path: Path
) -> None:
    home, faults = Home(tmp_path / "home"), tmp_path / "faults"
    faults.mkdir()
    fault = {"RAYMILL_FAULT": f"step_done:kill:step={KILL_STEP}", "RAYMILL_FAULT_FOLDER": str(faults)}
    code, _, stderr = home.run("train", *JOB, *first, "--set", "retry.lost_processes=0", variables=fault)
    # In process it is the command itself that dies; on Ray it is the worker, and the command says so.
    assert code == (-signal.SIGKILL if first == HERE else 1), stderr
    assert json.loads((faults / "fired.jsonl").read_text())["step"] == KILL_STEP
    stopped = home.json("runs", "show", home.folder().run_id, "--json")
    assert stopped["status"] == ("interrupted" if first == HERE else "failed")
    # The event of a step is written at the next step.
    assert stopped["step"] <= KILL_STEP

    resumed = train(home, "--json", "--resume", home.folder().run_id, *then)
    assert resumed.summary["weights_sha256"] == here.summary["weights_sha256"]
    assert resumed.last_checkpoint() == here.last_checkpoint()
    assert resumed.batches() == here.batches()
    assert resumed.summary["rows"] == here.summary["rows"]
    assert resumed.summary["delivered_to_mlflow"] is True
    assert [(start.attempt, start.num_workers, start.resumed) for start in resumed.starts] == [(1, 1, False), (2, 1, True)]
    # The checkpoint of step 3 was safe before that of step 6 was begun.
    assert resumed.starts[1].step in (3, 6)
    assert home.left_over() == []


def test_ctrl_c_saves_the_run_and_a_resume_ends_as_if_nothing_had_been(here: Trained, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    shared_before = set(os.listdir("/dev/shm"))
    # Steps that take a while, so that there is time to interrupt them.
    slow = {"RAYMILL_FAULT": "step_done:slow:seconds=0.3", "RAYMILL_FAULT_FOLDER": str(tmp_path)}
    process = home.start("train", *JOB, *HERE, variables=slow)
    wait_until(lambda: home.step() > 0, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 3, stderr
    run_id = home.folder().run_id
    said = json.loads(stdout)
    assert said["error"] == "Interrupted"
    assert f"--resume {run_id}" in said["message"]
    assert "Traceback" not in stderr
    stopped = home.json("runs", "show", run_id, "--json")
    assert stopped["status"] == "interrupted"
    assert 0 < stopped["step"] < NUM_STEPS
    assert f"saved at step {stopped['step']}" in said["message"]

    resumed = train(home, "--json", "--resume", run_id, *HERE)
    assert resumed.starts[1].step == stopped["step"], "no step is taken twice"
    assert resumed.summary["weights_sha256"] == here.summary["weights_sha256"]
    assert resumed.summary["rows"] == here.summary["rows"]
    assert resumed.batches() == here.batches()
    code, _, stderr = home.run("train", "--resume", run_id, *HERE)
    assert (code, "finished" in stderr) == (2, True)
    assert home.left_over() == []
    assert shared_memory.abandoned() - shared_before == set()


# ---------------------------------------------------------------- the job's own code

PIPELINE = """\
from pipelines.made import rows_of
from raymill.data.sources import ArraySource
from raymill.task import Field, Pipeline


def spoil(rows, split, generator):
    {transform}
    return rows


def points() -> Pipeline:
    schema = {{"x": Field("float32", (3,)), "y": Field("float32")}}
    return Pipeline(sources={{"train": ArraySource("points", rows_of, 8)}}, schema=schema, transform=spoil)
"""

ROWS = """\
import numpy as np


def rows_of():
    x = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1)}
"""

TASK = """\
import torch
from torch import nn

from raymill.task import Task


class Line(Task):
    def __init__(self) -> None:
        self.num_calls = 0

    def build(self):
        {build}
        return nn.Linear(3, 1)

    def loss(self, model, batch):
        self.num_calls += 1
        {loss}
        return ((model(batch["x"])[:, 0] - batch["y"]) ** 2).mean()

    def evaluate(self, model, batch):
        return {{}}
"""

LINE_JOB = """\
name: line
task: jobs.line.task:Line
pipeline: pipelines.points:points
optimizer: {kind: SGD, lr: 0.01}
loop: {epochs: 2, global_batch_rows: 8}
"""

WRONG = "raise LookupError('there is no such luck')"


def line_project(root: Path, **places: str) -> Home:
    """A project with one job, whose code has these statements in the places of these names."""
    filled = {"build": "pass", "loss": "pass", "transform": "pass", **places}
    files = {
        "pyproject.toml": "",
        "jobs/__init__.py": "",
        "jobs/line/__init__.py": "",
        "jobs/line/job.yaml": LINE_JOB,
        "jobs/line/task.py": TASK.format(**filled),
        "pipelines/__init__.py": "",
        "pipelines/made.py": ROWS,
        "pipelines/points.py": PIPELINE.format(**filled),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    # Imported in its own folder, whatever the tests' own path says.
    home = Home(root / ".raymill", root)
    home.environment.pop("PYTHONPATH", None)
    return home


@pytest.mark.parametrize(
    ("place", "file", "function"),
    [
        ("build", "jobs/line/task.py", "build"),
        ("loss", "jobs/line/task.py", "loss"),
        ("transform", "pipelines/points.py", "spoil"),
    ],
)
def test_an_error_in_the_jobs_own_code_comes_with_its_own_lines(place: str, file: str, function: str, tmp_path: Path) -> None:
    home = line_project(tmp_path / "mine", **{place: WRONG})
    code, stdout, stderr = home.run("train", "line", "--in-process", "--no-preflight", "--json")
    assert code == 1
    (line,) = [
        number for number, text in enumerate((home.project / file).read_text().splitlines(), start=1) if text.strip() == WRONG
    ]
    told = f"LookupError: there is no such luck\n  {file}:{line}, in {function}\n    {WRONG}\n"
    assert told in stderr
    assert "Traceback" not in stderr
    assert json.loads(stdout)["error"] == "LookupError"
    assert json.loads(stdout)["message"] in stderr
    shown = home.json("runs", "show", home.folder().run_id, "--json")
    assert shown["status"] == "failed"
    assert shown["message"].startswith(told)
    assert home.left_over() == []


def test_a_failed_run_goes_on_once_the_code_is_put_right(tmp_path: Path) -> None:
    wrong_later = f"if self.num_calls > 4: {WRONG}"
    home = line_project(tmp_path / "mine", loss=wrong_later)
    assert home.run("train", "line", "--in-process")[0] == 1
    task = home.project / "jobs/line/task.py"
    task.write_text(task.read_text().replace(wrong_later, "pass"))
    code, _, refusal = home.run("train", "--resume", home.folder().run_id, "--in-process")
    assert (code, "jobs/line/task.py" in refusal, "--accept-code-changes" in refusal) == (2, True, True), refusal
    resumed = train(home, "--json", "--resume", home.folder().run_id, "--in-process", "--accept-code-changes")
    whole = train(line_project(tmp_path / "other"), "--json", "line", "--in-process")
    assert [start.resumed for start in resumed.starts] == [False, True]
    assert resumed.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert resumed.summary["rows"] == whole.summary["rows"]


def test_a_breakpoint_stops_where_it_stands_and_the_run_goes_on_after_it(tmp_path: Path) -> None:
    home = line_project(tmp_path / "mine", loss="if self.num_calls == 1: breakpoint()")
    home.environment.pop("PYTHONBREAKPOINT", None)
    code, stdout, stderr = home.run("train", "line", "--in-process", stdin="p 6*7\np len(batch['x'])\nc\n")
    assert code == 0, stderr
    task = home.project / "jobs/line/task.py"
    assert f"> {task}(" in stdout
    assert ")loss()" in stdout
    assert stdout.count("(Pdb)") == 3
    assert "(Pdb) 42\n" in stdout
    assert "(Pdb) 8\n" in stdout
    assert home.json("runs", "show", home.folder().run_id, "--json")["status"] == "finished"


# ---------------------------------------------------------------- the caller

CALLER = """
import gc, json, logging, os, random, signal, sys, threading, warnings

import mlflow
import numpy as np
import psutil
import torch

import raymill


def state():
    return {
        **{f"environment variable {name}": value for name, value in os.environ.items()},
        "working folder": os.getcwd(),
        "threads of torch": torch.get_num_threads(),
        "random state of torch": torch.get_rng_state().tolist(),
        "random state of numpy": [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()],
        "random state of Python": random.getstate(),
        "type of new tensors": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "signal handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "garbage collection": [gc.isenabled(), *gc.get_threshold(), gc.get_freeze_count()],
        "logging": [logging.root.level, str(logging.root.handlers)],
        # MLflow keeps idle threads of its own.
        "threads of Python": sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith("Mlflow")),
        "process group": torch.distributed.is_initialized(),
        "MLflow": [mlflow.is_tracking_uri_set(), mlflow.active_run() and "a run"],
    }


torch.set_num_threads(3)
torch.manual_seed(11), np.random.seed(12), random.seed(13)
gc.set_threshold(900, 11, 12)
before = state()
run = raymill.load("smoke", **json.loads(sys.argv[1])).train(in_process=True, quiet=True)
after = state()
print(json.dumps({
    "status": run.status,
    "delivered": run.summary["delivered_to_mlflow"] if "delivered_to_mlflow" in run.summary else None,
    "weights_sha256": run.summary["weights_sha256"],
    "changed": {
        name: [before.get(name), after.get(name)] for name in before | after if before.get(name) != after.get(name)
    },
    "ray": sorted(name for name in sys.modules if name.split(".")[0] == "ray"),
    "children": [child.cmdline() for child in psutil.Process().children(recursive=True)],
}))
"""


def test_a_tracking_server_that_is_gone_holds_a_finished_run_up_for_seconds_and_its_events_are_kept(tmp_path: Path) -> None:
    home = line_project(tmp_path / "mine")
    home.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    begun_s = time.monotonic()
    told = home.json("train", "line", "--in-process", "--json")
    # MLflow alone would try for more than four minutes.
    assert time.monotonic() - begun_s < 120
    assert (told["status"], told["delivered_to_mlflow"]) == ("finished", False)
    del home.environment["MLFLOW_TRACKING_URI"]
    again = re.search(r"`python (-m raymill\.\S+ \S+)`", told["note"])
    assert again, told["note"]
    command = [sys.executable, *again[1].split()]
    subprocess.run(command, cwd=home.project, env=home.environment, capture_output=True, timeout=TIMEOUT_S, check=True)
    assert home.json("runs", "show", told["run_id"], "--json")["mlflow_run_id"]


def test_a_caller_from_python_finds_everything_as_it_was_and_no_ray(here: Trained, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    values = {"checkpoint__every_steps": 3, "register": {"model": "blobs"}}
    done = subprocess.run(
        [sys.executable, "-c", CALLER, json.dumps(values)],
        cwd=PROJECT,
        env=home.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == "finished"
    assert told["weights_sha256"] == here.summary["weights_sha256"]
    assert told["changed"] == {}
    assert told["ray"] == []
    assert told["children"] == []
    assert home.left_over() == []
