"""A run on a Ray cluster that was there before: on several machines, without a disk that they share, elastic.

Each node of the cluster is a `ray start` of its own, with a token. That a machine does not have the run's folder is made
so: its processes see an empty, read-only file system in its place.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from faults.cases import flip_page, own_digits
from integration.commands import Home
from integration.test_given import make_project
from integration.test_tune import SEARCH, command, told
from raymill.checkpoint import directory
from raymill.config import load, plan
from raymill.config.plan import ClusterFacts
from raymill.data.manifest import take_manifest
from raymill.data.order import Stream, window, window_rows

pytestmark = pytest.mark.timeout(900)

PROJECT = Path(__file__).parents[2]
RAY = "ray.scripts.scripts"
"""The module behind the command `ray`."""

HIDE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro none "$1" && shift && exec "$@"', "sh"]
"""Begins a command that shall not see what is in the folder named next. Needs root."""

POPULATION = command(
    {
        **SEARCH,
        "space": {"optimizer.lr": {"kind": "loguniform", "low": 1e-4, "high": 0.2}},
        "trials": 6,
        "scheduler": {"kind": "pbt", "population": 3, "quantile": 0.34, "grace": 2},
    },
    *("--set", "loop.epochs=4"),
)
"""A search whose later trials go on from earlier ones."""

START_TIMEOUT_S = 240.0
STEP_TIMEOUT_S = 600.0


def until(true: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Wait for something that happens in other processes."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.2)
    return found


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


@dataclass
class Nodes:
    """A Ray cluster on this machine, and the environment of commands that use it."""

    folder: Path
    variables: dict[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    commands: list[subprocess.Popen[str]] = field(default_factory=list)
    address: str = ""
    python: str = sys.executable
    project: Path = PROJECT

    def add(self, num_cpus: int, *options: str, hidden: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a node; its processes do not see what is in the folder `hidden`."""
        command = [self.python, "-m", RAY, "start", "--block", f"--num-cpus={num_cpus}", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={100 * 2**20}", *options]
        command += [f"--address={self.address}"] if self.address else []
        if hidden is not None:
            command = [*HIDE, str(hidden), *command]
        with open(self.folder / f"node-{len(self.running)}.log", "wb") as log:
            # Apart from this process, which no signal among Ray's own may reach.
            node = subprocess.Popen(command, env=self.variables, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        self.running.append(node)
        return node

    def remove(self, node: subprocess.Popen[bytes]) -> None:
        """Lose a node: all its processes at once."""
        kill_tree(node)

    def facts(self) -> dict[str, Any]:
        """What raymill finds there."""
        asked = [self.python, "-m", "raymill.orchestration.cluster_facts"]
        done = subprocess.run(asked, env=self.variables, capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 and done.stdout else {}

    def wait_for_cpus(self, num_cpus: int) -> None:
        until(lambda: self.facts().get("num_cpus") == num_cpus, START_TIMEOUT_S, f"a cluster of {num_cpus} CPUs")

    def node_with(self, name: str) -> str | None:
        """The id of the living node that has a resource of this name."""
        code = "import json, ray; ray.init(log_to_driver=False); print(json.dumps(ray.nodes()))"
        done = subprocess.run([self.python, "-c", code], env=self.variables, capture_output=True, text=True, check=True)
        known = json.loads(done.stdout.splitlines()[-1])
        return next((node["NodeID"] for node in known if node["Alive"] and name in node["Resources"]), None)

    def drain(self, name: str, seconds: int = 600) -> None:
        """Give notice that the node with the resource of this name is to leave."""
        node = until(lambda: self.node_with(name), START_TIMEOUT_S, f"a node with the resource {name}")
        command = [self.python, "-m", RAY, "drain-node", f"--node-id={node}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message=taken back", f"--deadline-remaining-seconds={seconds}"]
        subprocess.run(command, env=self.variables, capture_output=True, check=True)

    def start(self, job: str, *arguments: str) -> subprocess.Popen[str]:
        command = [self.python, "-m", "raymill", "train", job, "--json", *arguments]
        pipe = subprocess.PIPE
        self.commands.append(subprocess.Popen(command, env=self.variables, cwd=self.project, text=True, stdout=pipe, stderr=pipe))
        return self.commands[-1]

    def runs(self) -> list[Path]:
        return list((self.folder / "home" / "runs").glob("*"))

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for run in self.runs() for line in read_lines(run / "events.jsonl")]

    def story(self) -> str:
        """What happened, for a test that failed."""
        told = [str(event) for event in self.events() if event["kind"] != "step"]
        logs = [line for run in self.runs() for line in read_lines(run / "ray.log") if "PlacementGroupCleaner" not in line]
        ends = [line for path in sorted(self.folder.glob("node-*.log")) for line in read_lines(path)[-3:]]
        return "\n".join([*told, *logs[-60:], *ends])


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def finish(command: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    """Wait for a command; its answer."""
    out, err = command.communicate(timeout=STEP_TIMEOUT_S)
    assert command.returncode == code, out + err
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A cluster without a node; whatever is left of it in the end is killed."""
    with tempfile.TemporaryDirectory(prefix="nodes-") as name:
        folder = Path(name)
        (folder / "home").mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RAYMILL_"))}
        # Ray's own commands leave there which cluster was last started, for whoever comes next.
        own = {
            "RAY_TMPDIR": str(folder),
            "RAYMILL_HOME": str(folder / "home"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        started = Nodes(folder, kept | own | {"RAY_ADDRESS": f"127.0.0.1:{port}", "PYTHONPATH": str(PROJECT / "platform")})
        try:
            yield started
        finally:
            print(started.story())
            for command in started.commands:
                if command.poll() is None:
                    kill_tree(command)
                    command.communicate()
            for node in reversed(started.running):
                if node.poll() is None:
                    started.remove(node)


def start_head(nodes: Nodes, num_cpus: int) -> None:
    port = nodes.variables["RAY_ADDRESS"].rpartition(":")[2]
    # Short, because the sockets in it have a length limit.
    options = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    nodes.add(num_cpus, *options, f"--temp-dir={nodes.folder / 'ray'}")
    nodes.wait_for_cpus(num_cpus)
    nodes.address = nodes.variables["RAY_ADDRESS"]


def embedded_run(folder: Path, *job: str) -> dict[str, Any]:
    """A job on a Ray of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RAYMILL_"))}
    command = [sys.executable, "-m", "raymill", "train", *job, "--json"]
    variables = kept | {"RAYMILL_HOME": str(folder), "PYTHONPATH": str(PROJECT / "platform")}
    return finish(subprocess.Popen(command, env=variables, cwd=PROJECT, text=True, stdout=-1, stderr=-1))


@pytest.mark.cluster
def test_trials_on_a_machine_without_their_runs_folders_go_on_from_what_came_home_and_end_as_on_this_machine(
    nodes: Nodes, tmp_path: Path
) -> None:
    if not can_hide(nodes.folder / "home"):
        pytest.skip("needs the right to mount")
    job = [*POPULATION, "--json"]
    here, there = Home(tmp_path / "here"), Home(nodes.folder / "home")
    assert here.json(*job)["trials"] == {"complete": 6}
    start_head(nodes, 0)
    nodes.add(1, hidden=there.path)
    nodes.wait_for_cpus(1)
    # Once in the middle of a trial that goes on from another one, behind a commit.
    fault = {"RAYMILL_FAULT": "step_done:delay:step=26:seconds=3,step_done:kill:step=28", "RAYMILL_FAULT_FOLDER": str(tmp_path)}
    code, out, said = there.run(*job, variables=nodes.variables | fault)
    assert code == 0, said
    assert json.loads(out)["trials"] == {"complete": 6}
    assert told(there) == told(here)
    starts = [event for event in nodes.events() if event["kind"] == "start"]
    [killed] = [event for event in starts if event["attempt"] == 2]
    assert killed["step"] >= 24, "it goes on from the commit that came home"
    for run in nodes.runs():
        directory.verify(max((run / "checkpoints").glob("step-*")))


def planned(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raymill", "plan", "smoke", "--json"]
    return subprocess.run(command, env=variables, cwd=PROJECT, capture_output=True, text=True, check=False)


def can_hide(folder: Path) -> bool:
    """Whether this process may start others that see another file system."""
    return shutil.which("unshare") is not None and subprocess.run([*HIDE, str(folder), "true"], check=False).returncode == 0


@pytest.mark.cluster_short
@pytest.mark.integration
def test_a_worker_on_a_machine_without_the_runs_folder_writes_it_all_there_and_ends_with_the_weights_of_this_machine(
    nodes: Nodes,
) -> None:
    if not can_hide(nodes.folder / "home"):
        pytest.skip("needs the right to mount")
    start_head(nodes, 0)
    nodes.add(2, hidden=nodes.folder / "home")
    nodes.wait_for_cpus(2)
    summary = finish(nodes.start("smoke", "--workers=1", "--set", "loop.record_order=true"))
    [run] = nodes.runs()
    assert "host" in json.loads((run / "rank-0.json").read_text()), "the rank was on a machine that has the folder"
    here = embedded_run(nodes.folder / "here", "smoke", "--in-process", "--set", "loop.record_order=true")
    assert summary["weights_sha256"] == here["weights_sha256"]
    assert summary["metrics"] == here["metrics"]
    assert [event["step"] for event in nodes.events() if event["kind"] == "step"] == list(range(1, 21))
    assert read_lines(run / "order-0.jsonl") == read_lines(Path(here["folder"]) / "order-0.jsonl")
    checkpoint, expected = run / summary["best_checkpoint"], Path(here["folder"]) / here["best_checkpoint"]
    assert (checkpoint / "checksums.json").read_bytes() == (expected / "checksums.json").read_bytes()
    directory.verify(checkpoint)


@pytest.mark.cluster
def test_a_model_that_a_job_is_given_travels_to_a_machine_without_the_runs_folder(nodes: Nodes, tmp_path: Path) -> None:
    if not can_hide(nodes.folder / "home"):
        pytest.skip("needs the right to mount")
    nodes.project = make_project(tmp_path / "project")
    start_head(nodes, 0)
    nodes.add(2, hidden=nodes.folder / "home")
    nodes.wait_for_cpus(2)
    finish(nodes.start("teacher", "--in-process"))
    there = finish(nodes.start("student", "--workers=1", "--set", "register=null"))
    [run] = (path for path in nodes.runs() if path.name.startswith("student"))
    assert "host" in json.loads((run / "rank-0.json").read_text()), "the rank was on a machine that has the folder"
    here = finish(nodes.start("student", "--in-process", "--set", "register=null"))
    assert there["weights_sha256"] == here["weights_sha256"]


@pytest.mark.cluster
def test_a_cluster_that_asks_for_another_token_says_so(nodes: Nodes) -> None:
    start_head(nodes, 1)
    done = planned(nodes.variables | {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
    assert done.returncode == 2
    assert "RAY_ADDRESS" in done.stdout
    assert planned(nodes.variables).returncode == 0


@pytest.mark.cluster
def test_a_cluster_that_asks_for_no_token_is_refused_unless_the_user_says_so(nodes: Nodes) -> None:
    token = nodes.variables.pop("RAY_AUTH_TOKEN")
    nodes.variables["RAY_AUTH_MODE"] = "disabled"
    start_head(nodes, 1)
    assert planned(nodes.variables).returncode == 0
    done = planned(nodes.variables | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
    assert done.returncode == 2
    assert "runs code for whoever can reach it" in done.stdout


@pytest.mark.cluster
def test_workers_on_machines_without_the_runs_folder_end_with_the_weights_of_one_machine(nodes: Nodes) -> None:
    start_head(nodes, 0)
    nodes.add(3, hidden=nodes.folder / "home")
    nodes.wait_for_cpus(3)
    # Steps that take a while, so that there is time to interrupt them.
    nodes.variables |= {"RAYMILL_FAULT": "step_done:slow:seconds=0.4", "RAYMILL_FAULT_FOLDER": str(nodes.folder)}
    command = nodes.start("smoke", "--set", "checkpoint.every_steps=3", "--set", "loop.record_order=true")

    def steps() -> list[int]:
        return [event["step"] for event in nodes.events() if event["kind"] == "step"]

    until(steps, STEP_TIMEOUT_S, "a first step")
    command.send_signal(signal.SIGINT)
    finish(command, code=3)
    [run] = nodes.runs()
    assert len(steps()) < 20
    summary = finish(nodes.start(f"--resume={run.name}"))
    assert [event["resumed"] for event in nodes.events() if event["kind"] == "start"] == [False, True]
    hosts = [json.loads((run / f"rank-{rank}.json").read_text())["host"] for rank in range(2)]
    assert len(hosts) == 2, "a rank on the driver's machine has no host"
    assert steps() == list(range(1, 21))
    assert (run / summary["best_checkpoint"] / "weights.safetensors").is_file()
    assert [len(read_lines(run / f"order-{rank}.jsonl")) for rank in range(2)] == [20, 20]
    assert summary["weights_sha256"] == embedded_run(nodes.folder / "embedded", "smoke")["weights_sha256"]


@pytest.mark.cluster
def test_ranks_here_and_on_a_machine_without_the_runs_folder_train_together_and_count_bad_rows_once(nodes: Nodes) -> None:
    data = own_digits(nodes.folder)
    flip_page(sorted(data.glob("*.parquet"))[2])
    job = ["mnist", "--workers=2"]
    values = [f"data.root={data.parent}", "model.width=4", "loop.epochs=1", "loop.global_batch_rows=30", "register=null"]
    # A whole machine each, so that there is one on either; a third machine reads.
    values += ["scale.cpus_per_worker=2", "loop.threads=1"]
    job += [part for value in [*values, "bad_rows.policy=quarantine", "bad_rows.budget=30"] for part in ("--set", value)]
    start_head(nodes, 2)
    # One after the other: of two nodes that are started at once on one machine, one may not find its way.
    nodes.add(2, hidden=nodes.folder / "home")
    nodes.wait_for_cpus(4)
    nodes.add(1, hidden=nodes.folder / "home")
    nodes.wait_for_cpus(5)
    summary = finish(nodes.start(*job))
    [run] = nodes.runs()
    assert sum("host" in json.loads((run / f"rank-{rank}.json").read_text()) for rank in range(2)) == 1
    assert (summary["rows"]["used"], summary["rows"]["skipped"], summary["bad_rows"]["distinct"]) == (210, 30, 30)
    assert len(read_lines(run / "quarantine.jsonl")) == 30
    assert (
        summary["weights_sha256"]
        == embedded_run(nodes.folder / "embedded", *job, "--set", "scale.cpus_per_worker=0.5")["weights_sha256"]
    )


@pytest.mark.cluster
def test_a_run_leaves_a_machine_that_is_to_go_and_stops_when_there_is_no_other(nodes: Nodes) -> None:
    # Slow until it is on the last machine: each of the others is to be lost, or to come, before it ends.
    slow = ",".join(f"step_done:slow:attempt={attempt}:seconds=0.5" for attempt in (1, 2))
    nodes.variables |= {"RAYMILL_FAULT": slow, "RAYMILL_FAULT_FOLDER": str(nodes.folder)}
    start_head(nodes, 0)
    nodes.add(3, '--resources={"first": 1}')
    nodes.wait_for_cpus(3)
    job = ["smoke", "--workers=2", "--set", "checkpoint.every_steps=1000", "--set", "data.num_rows=12000"]
    command = nodes.start(*job)

    def steps(attempt: int) -> int:
        events = nodes.events()
        begun = [place for place, event in enumerate(events) if event["kind"] == "start"]
        return sum(event["kind"] == "step" for event in events[begun[attempt - 1] :]) if len(begun) >= attempt else 0

    until(lambda: steps(1) >= 2, STEP_TIMEOUT_S, "steps on the first machine")
    nodes.drain("first")
    finish(command, code=3)
    assert [event["goes_on"] for event in nodes.events() if event["kind"] == "drain"] == [False]

    nodes.add(3, '--resources={"second": 1}')
    until(lambda: nodes.node_with("second"), START_TIMEOUT_S, "the second machine")
    [run] = nodes.runs()
    command = nodes.start(f"--resume={run.name}")
    until(lambda: steps(2) >= 2, STEP_TIMEOUT_S, "steps on the second machine")
    nodes.add(3, '--resources={"third": 1}')
    until(lambda: nodes.node_with("third"), START_TIMEOUT_S, "the third machine")
    nodes.drain("second")
    summary = finish(command)
    assert [event["goes_on"] for event in nodes.events() if event["kind"] == "drain"] == [False, True]
    # No step was made twice: the notice came in time to save.
    assert [event["step"] for event in nodes.events() if event["kind"] == "step"] == list(range(1, summary["steps"] + 1))
    assert summary["attempts"] == 3
    assert summary["weights_sha256"] == embedded_run(nodes.folder / "embedded", *job)["weights_sha256"]


def expected_batches(job: str, overrides: list[str]) -> dict[int, list[int]]:
    """Position behind each global batch -> its row ids, from the order alone."""
    spec = load.load_job(PROJECT / "jobs" / job / "job.yaml", overrides).spec
    manifest = take_manifest(load.import_pipeline(spec))
    planned = plan.make_plan(spec, manifest, ClusterFacts(num_cpus=2, num_gpus=0, memory_bytes=2**33))
    order = plan.job_order(spec, planned, manifest)
    rows: list[int] = []
    stream = Stream(order, 0)
    for item in (stream[index] for index in range(len(stream))):
        if item.split == "train":
            rows += window_rows(order.train, item.epoch, window(order.train, item.epoch, item.window).fragments)[0].tolist()
    size = planned.global_batch_rows
    return {start + size: rows[start : start + size] for start in range(0, len(rows), size)}


def trained_batches(run: Path, starts: list[dict[str, Any]]) -> dict[int, list[int]]:
    """Position behind each global batch -> the row ids that its last trainers had, in the order of their ranks."""
    found: dict[int, tuple[int, list[int]]] = {}
    for start in starts:
        for rank in range(start["num_workers"]):
            for record in map(json.loads, read_lines(run / f"order-{rank}.jsonl")):
                if record["attempt"] == start["attempt"]:
                    attempt, rows = found.get(record["position"], (0, []))
                    rows = rows if attempt == record["attempt"] else []
                    found[record["position"]] = record["attempt"], rows + record["rows"]
    return {position: rows for position, (_, rows) in sorted(found.items())}


ELASTIC = ["scale.workers=null", "scale.min_workers=1", "scale.max_workers=3", "scale.resize_check_s=2"]
LONG = ["data.num_rows=7200", "checkpoint.every_steps=10", "loop.record_order=true"]


@pytest.mark.cluster
def test_two_workers_then_one_then_three_train_on_the_same_batches_in_one_run(nodes: Nodes) -> None:
    # Steps that take a while, so that there is time to change the cluster.
    nodes.variables |= {"RAYMILL_FAULT": "step_done:slow:seconds=0.5", "RAYMILL_FAULT_FOLDER": str(nodes.folder)}
    start_head(nodes, 1)
    second = nodes.add(1)
    nodes.wait_for_cpus(2)
    command = nodes.start("smoke", *(part for value in ELASTIC + LONG for part in ("--set", value)))

    def starts() -> list[dict[str, Any]]:
        return [event for event in nodes.events() if event["kind"] == "start"]

    def trains(num_workers: int) -> bool:
        """Whether this many workers have begun and made a few steps."""
        known = nodes.events()
        begun = [place for place, event in enumerate(known) if event["kind"] == "start"]
        steps = [event for event in known[begun[-1] :] if event["kind"] == "step"] if begun else []
        return len(steps) >= 3 and known[begun[-1]]["num_workers"] == num_workers

    until(lambda: trains(2), STEP_TIMEOUT_S, "two workers")
    nodes.remove(second)
    until(lambda: trains(1), STEP_TIMEOUT_S, "one worker")
    nodes.add(2)
    until(lambda: trains(3), STEP_TIMEOUT_S, "three workers")
    summary = finish(command)

    assert [event["attempt"] for event in starts()] == list(range(1, len(starts()) + 1))
    assert "resize" in {event["kind"] for event in nodes.events()}
    [run] = nodes.runs()
    assert trained_batches(run, starts()) == expected_batches("smoke", ELASTIC + LONG)
    assert summary["rows"]["used"] == summary["rows"]["total"]
    assert summary["num_workers"] == 3


@pytest.mark.cluster
@pytest.mark.integration
def test_a_project_of_its_own_with_the_wheel_alone_trains_on_a_cluster(nodes: Nodes, environment: Path, tmp_path: Path) -> None:
    nodes.python, nodes.project = str(environment / "python"), tmp_path / "mine"
    del nodes.variables["PYTHONPATH"]
    start_head(nodes, 2)
    made = subprocess.run(
        [str(environment / "raymill"), "init", str(nodes.project)],
        env=nodes.variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    summary = finish(nodes.start("demo", "--workers=2"))
    assert (summary["status"], summary["num_workers"], summary["delivered_to_mlflow"]) == ("finished", 2, True)
    assert summary["rows"] == {"used": 1200, "skipped": 0, "remaining": 0, "total": 1200}
