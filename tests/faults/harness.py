"""Starts runs of the command line, lets something go wrong, and collects all that is left when they are over.

A run gets a state folder, a temporary folder and a folder for its faults of its own. Every process of it inherits these
names, and so can be found whatever it became. Nothing is asked of any process: the run's files say what happened.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import shared_memory
from raymill.checkpoint.directory import names, read_pointer, verify
from raymill.errors import CheckpointError
from raymill.files import STAGE, read_record
from raymill.orchestration.on_ray.turn import GATE
from raymill.record.events import AttemptStarted, Event, FirstStepDone, StepDone, read_events
from raymill.record.folder import RunFolder

PROJECT = Path(__file__).parents[2]
POLL_S = 0.05
LOOK_S = 1.0
LIMIT_S = 600.0
GRACE_S = 5.0

KINDS = {
    "worker": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "coordinator": "ray::SplitCoordinator",
    "reader": "ray::MapBatches",
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
    "driver": "raymill.orchestration.on_ray.driver",
    "tracking": "raymill.orchestration.tracker",
}
"""What the command line of each kind of process holds."""

SHARED = ("plasma", "ray", "torch_", "gloo", "nccl", "psm_", "sem.")
"""How files in shared memory begin that Ray, torch and Python make; other programs make theirs at any time."""


class Live:
    """A run that is going on, and the folders that are its own."""

    def __init__(self) -> None:
        # Short: Ray makes sockets in it, whose paths may have 107 bytes.
        self.tmp = Path(tempfile.mkdtemp(prefix="rf-", dir="/tmp"))
        self.home = self.tmp / "home"
        self.faults = self.tmp / "faults"
        self.scratch = self.tmp / "t"
        for folder in (self.home / "data", self.faults, self.scratch):
            folder.mkdir(parents=True)
        data = PROJECT / ".raymill" / "data" / "mnist"
        if data.is_dir():
            (self.home / "data" / "mnist").symlink_to(data)
        self.command: subprocess.Popen[bytes] | None = None
        self.num_commands = 0
        self.servers: list[subprocess.Popen[bytes]] = []
        self.server_port = 0
        self.seen: set[psutil.Process] = set()
        self.settings: dict[str, str] = {}

    def environment(self, fault: str = "") -> dict[str, str]:
        """Of every process of this run."""
        own: dict[str, object] = {"RAYMILL_HOME": self.home, "RAYMILL_FAULT_FOLDER": self.faults, "TMPDIR": self.scratch}
        if self.server_port:
            own |= {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.server_port}"}
        others = {name: value for name, value in os.environ.items() if not name.startswith(("RAY", "MLFLOW_"))}
        return {**others, **self.settings, **{name: str(value) for name, value in own.items()}, "RAYMILL_FAULT": fault}

    def start(self, arguments: list[str], fault: str = "") -> subprocess.Popen[bytes]:
        """Start a command of raymill; what it prints goes to files of its own."""
        number = self.num_commands
        self.num_commands += 1
        with open(self.tmp / f"{number}.out", "wb") as out, open(self.tmp / f"{number}.err", "wb") as err:
            command = [sys.executable, "-m", "raymill", *arguments]
            return subprocess.Popen(command, env=self.environment(fault), stdout=out, stderr=err, cwd=PROJECT)

    def said(self, number: int) -> str:
        """What a command printed on stderr."""
        return (self.tmp / f"{number}.err").read_text()

    def printed(self, number: int) -> dict[str, Any]:
        """The JSON object that a command printed, or an empty one."""
        text = (self.tmp / f"{number}.out").read_text()
        try:
            values: dict[str, Any] = json.loads(text)
        except ValueError:
            return {}
        return values

    @property
    def folder(self) -> RunFolder | None:
        """The run's folder, once it is there."""
        found = [path.parent for path in self.home.glob("runs/*/spec.json")]
        return RunFolder(found[0]) if found else None

    def step(self) -> int:
        """The last step that rank 0 has reported."""
        events = read_events(self.folder.events)[0] if self.folder else []
        return max((event.step for event in events if isinstance(event, StepDone)), default=0)

    def look(self) -> None:
        """Remember the command's children: some of Ray's hide their environment, and would not be found later."""
        with suppress(psutil.Error):
            if self.command:
                self.seen.update(psutil.Process(self.command.pid).children(recursive=True))

    def processes(self, kind: str = "") -> list[psutil.Process]:
        """The processes of this run of a kind, oldest first."""
        found = [process for process in self.seen if is_alive(process)] if not kind else []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                mine = process.environ().get("RAYMILL_HOME") == str(self.home)
                if mine and process not in found and KINDS.get(kind, "") in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def fired(self) -> list[dict[str, Any]]:
        """The faults that have happened."""
        file = self.faults / "fired.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def serve(self) -> None:
        """Start an MLflow server with the run's database, again after it was killed, and wait until it answers."""
        if not self.server_port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.server_port = probe.getsockname()[1]
        store, address = f"sqlite:///{self.home / 'mlflow.db'}", f"127.0.0.1:{self.server_port}"
        options = ["--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(self.server_port), "--workers", "1"]
        options += ["--artifacts-destination", str(self.home / "artifacts"), "--allowed-hosts", address]
        with open(self.tmp / "server.log", "ab") as log:
            command = [sys.executable, "-m", "mlflow", "server", *options]
            # Without its own jobs, whose queue it would keep in shared memory.
            settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            environment = {**os.environ, **settings}
            self.servers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        until_s = time.monotonic() + LIMIT_S
        while time.monotonic() < until_s:
            with suppress(OSError), urllib.request.urlopen(f"http://{address}/health", timeout=5):
                return
            time.sleep(POLL_S)
        raise AssertionError(f"the MLflow server did not start: {(self.tmp / 'server.log').read_text()[-500:]}")

    def signal_server(self, number: int) -> None:
        """Signal the last MLflow server and all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.servers[-1].pid, number)
        if number == signal.SIGKILL:
            self.servers[-1].wait()

    def forget_faults(self) -> None:
        """Let the faults of the next command happen, whatever happened before."""
        for file in self.faults.iterdir():
            file.unlink()

    def remove(self) -> None:
        """End what is left and remove the folders."""
        if self.servers:
            self.signal_server(signal.SIGKILL)
        # Again while there are any: one may have started another meanwhile.
        while found := self.processes():
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, timeout=GRACE_S)
        for folder in [self.scratch, *self.home.glob("runs/*/checkpoints")]:
            if folder.is_mount():
                subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(self.tmp, ignore_errors=True)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def live() -> Iterator[Live]:
    """A place for one run, gone with all its processes at the end."""
    made = Live()
    try:
        yield made
    finally:
        if os.environ.get("KEEP"):
            print(f"kept: {made.tmp}")
        else:
            made.remove()


Provoke = Callable[[Live], bool]
"""Asked again and again while a command runs, until it has done what it is there for."""


@dataclass
class Result:
    """What is left of a run after a command.

    Attributes:
        exit_code: of the command; None: it was ended after LIMIT_S seconds.
        message: of its error, "" without one.
        weights: SHA-256 of the last and of the best ones, and the step of the best.
        order: position behind a batch -> its row ids, in order.
        attempts: worker groups that started.
        fired: points where a fault happened.
        provoked: whether all that was to go wrong did.
        broken: what is wrong with the checkpoints.
        left: processes and files that should be gone.
        tracked: what is wrong with the metrics in MLflow.
        seconds: the command took.
        said: what it printed on stderr.
    """

    exit_code: int | None
    message: str
    weights: dict[str, Any]
    order: dict[int, list[int]]
    attempts: int
    fired: list[str]
    provoked: bool
    broken: list[str]
    left: list[str]
    tracked: list[str]
    seconds: float
    said: str
    summary: dict[str, Any] = field(default_factory=dict)


def play(place: Live, arguments: list[str], fault: str = "", provoke: Provoke | None = None, *, orphans: bool = False) -> Result:
    """Run one command to its end, with what is to go wrong on the way; and what it leaves, if it may leave `orphans`."""
    shared_before = set(os.listdir("/dev/shm"))
    begun_s, number = time.monotonic(), place.num_commands
    command = place.command = place.start(arguments, fault)
    provoked, looked_s = provoke is None, 0.0
    while command.poll() is None and time.monotonic() - begun_s < LIMIT_S:
        provoked = provoked or provoke is None or provoke(place)
        if time.monotonic() > looked_s + LOOK_S:
            looked_s = time.monotonic()
            place.look()
        time.sleep(POLL_S)
    exit_code = command.poll()
    if exit_code is None:
        command.kill()
        command.wait()
    while orphans and place.processes() and time.monotonic() - begun_s < LIMIT_S:
        time.sleep(POLL_S)
    return collect(place, number, exit_code, provoked, shared_before, time.monotonic() - begun_s)


def collect(place: Live, number: int, exit_code: int | None, provoked: bool, shared_before: set[str], seconds: float) -> Result:
    """Everything that can be seen once a command has ended."""
    shared = {name for name in shared_memory.abandoned() if name.startswith(SHARED)} - shared_before
    left = left_over(place) + [f"/dev/shm/{name}" for name in sorted(shared)]
    printed, folder = place.printed(number), place.folder
    events = read_events(folder.events)[0] if folder else []
    done = read_record(folder.summary) if folder and folder.summary.exists() else {}
    return Result(
        exit_code=exit_code,
        message=printed.get("message", ""),
        weights={name: done.get(name) for name in ("weights_sha256", "best_step", "best_weights_sha256")},
        order=order_of(folder) if folder else {},
        attempts=sum(isinstance(event, AttemptStarted) for event in events),
        fired=[event["point"] for event in place.fired()],
        provoked=provoked,
        broken=broken_checkpoints(folder) if folder else [],
        left=left,
        tracked=wrong_metrics(place, events) if exit_code in (0, -9) and done else [],
        seconds=seconds,
        said=place.said(number),
        summary=done,
    )


def order_of(folder: RunFolder) -> dict[int, list[int]]:
    """The rows of each global batch in order, as the last attempt that trained on it took them."""
    taken: dict[int, dict[int, dict[int, list[int]]]] = {}
    for file in sorted(folder.path.glob("order-*.jsonl")):
        rank = int(file.stem.removeprefix("order-"))
        for line in file.read_text().splitlines():
            record = json.loads(line)
            ranks = taken.setdefault(record["position"], {}).setdefault(record["attempt"], {})
            ranks.setdefault(rank, []).extend(record["rows"])
    last = {position: attempts[max(attempts)] for position, attempts in sorted(taken.items())}
    return {position: [row for rank in sorted(ranks) for row in ranks[rank]] for position, ranks in last.items()}


def broken_checkpoints(folder: RunFolder) -> list[str]:
    """What is wrong with the checkpoints that the pointer names, and what was left half-written."""
    pointer = read_pointer(folder.checkpoints)
    found = []
    for name in {pointer.latest, pointer.best} - {None} if pointer else set():
        try:
            verify(folder.checkpoints / str(name))
        except CheckpointError as error:
            found.append(str(error))
    if pointer is None and names(folder.checkpoints):
        found.append("checkpoints without a pointer")
    # What a failed run could not write is removed when it is resumed.
    if folder.summary.exists():
        found += [f"{path.name} was left" for path in folder.checkpoints.glob(f"{STAGE}*")]
    return found


def left_over(place: Live) -> list[str]:
    """Processes of the run and folders of Ray that outlived it."""
    until_s = time.monotonic() + GRACE_S
    while (alive := place.processes()) and time.monotonic() < until_s:
        time.sleep(POLL_S)
    found = []
    for process in alive:
        with suppress(psutil.Error):
            found.append(f"process {process.pid} {' '.join(process.cmdline())[:60]}")
    # Torch keeps a folder for compiled kernels; it stays on purpose.
    stale = [path.name for path in place.scratch.iterdir() if not path.name.startswith("torchinductor_")]
    found += [f"{name} in the temporary folder" for name in stale]
    return found


def wrong_metrics(place: Live, events: list[Event]) -> list[str]:
    """Whether MLflow has one run, finished, with each step's loss once, and no other."""
    # A step whose batch was left out has no loss.
    steps = sorted({event.step for event in events if isinstance(event, StepDone) and "train/loss" in event.metrics})
    with sqlite3.connect(f"file:{place.home / 'mlflow.db'}?mode=ro", uri=True) as store:
        runs = store.execute("select run_uuid, status from runs").fetchall()
        found = Counter(step for (step,) in store.execute("select step from metrics where key = 'train/loss'"))
    problems = [] if [status for _, status in runs] == ["FINISHED"] else [f"MLflow has the runs {runs}"]
    doubled = [step for step, count in found.items() if count > 1]
    if doubled:
        problems.append(f"MLflow has the loss of steps {doubled} more than once")
    if sorted(found) != steps:
        problems.append(f"MLflow has {len(found)} of {len(steps)} steps")
    return problems


# ---------------------------------------------------------------- from outside


def kill(kind: str, step: int = 12, number: int = signal.SIGKILL, rank: int = 0) -> Provoke:
    """Signal the `rank`-th oldest process of a kind once a step is done."""

    def provoke(place: Live) -> bool:
        if place.step() < step:
            return False
        found = place.processes(kind)
        if len(found) <= rank:
            return False
        with suppress(psutil.NoSuchProcess):
            found[rank].send_signal(number)
            return True
        return False

    return provoke


def waiting_at_gate(place: Live) -> int:
    """How many workers of a driver that stands by are ready: the kernel lists who waits for a lock."""
    gates = {f":{file.stat().st_ino}" for file in place.scratch.glob(f"raymill-*/{GATE}")}
    locks = Path("/proc/locks").read_text().splitlines()
    return sum(" -> " in lock and any(f"{gate} " in lock for gate in gates) for lock in locks)


def kill_once_another_stands_by(kind: str, attempt: int, workers: int = 2) -> Provoke:
    """Kill the driver or the last rank of this attempt once it has trained and another driver's workers are ready."""

    def provoke(place: Live) -> bool:
        events = read_events(place.folder.events)[0] if place.folder else []
        if sum(isinstance(event, FirstStepDone) for event in events) < attempt or waiting_at_gate(place) < workers:
            return False
        assert place.folder is not None
        own = place.folder.driver_lock.read_text() if kind == "driver" else process_of_rank(place.folder, workers - 1)
        os.kill(int(own), signal.SIGKILL)
        return True

    return provoke


def process_of_rank(folder: RunFolder, rank: int) -> int:
    """The process of a rank."""
    return int(json.loads((folder.path / f"rank-{rank}.json").read_text())["pid"])


def interrupt(step: int = 12, number: int = signal.SIGTERM) -> Provoke:
    """Signal the command itself once a step is done."""

    def provoke(place: Live) -> bool:
        if place.step() < step or place.command is None:
            return False
        place.command.send_signal(number)
        return True

    return provoke


def pause(kind: str, seconds: float, step: int = 12) -> Provoke:
    """Stop a process with SIGSTOP, and let it go on after some seconds."""
    stopped: list[tuple[psutil.Process, float]] = []

    def provoke(place: Live) -> bool:
        if not stopped:
            found = place.processes(kind) if place.step() >= step else []
            if found:
                found[0].suspend()
                stopped.append((found[0], time.monotonic()))
            return False
        process, since_s = stopped[0]
        if time.monotonic() - since_s < seconds:
            return False
        process.resume()
        return True

    return provoke


def server_gone(number: int, seconds: float, step: int = 4) -> Provoke:
    """Kill or stop the MLflow server, and start it again or let it go on after some seconds."""
    since_s: list[float] = []

    def provoke(place: Live) -> bool:
        if not since_s:
            if place.step() >= step:
                place.signal_server(number)
                since_s.append(time.monotonic())
            return False
        if time.monotonic() - since_s[0] < seconds:
            return False
        if number == signal.SIGKILL:
            place.serve()
        else:
            place.signal_server(signal.SIGCONT)
        return True

    return provoke


def lock_store(seconds: float, step: int = 3) -> Provoke:
    """Hold MLflow's database with an exclusive transaction for some seconds."""
    held: list[tuple[sqlite3.Connection, float]] = []

    def provoke(place: Live) -> bool:
        if not held:
            if place.step() < step or not (place.home / "mlflow.db").exists():
                return False
            store = sqlite3.connect(place.home / "mlflow.db", timeout=0.01, isolation_level=None)
            try:
                store.execute("begin exclusive")
            except sqlite3.OperationalError:
                store.close()
                return False
            held.append((store, time.monotonic()))
        store, since_s = held[0]
        if time.monotonic() - since_s < seconds:
            return False
        store.close()
        return True

    return provoke
