"""When no step is made for too long: who waits for whom, seen from outside and from each rank's stacks.

Each rank leaves its process id in the run's folder and writes the stacks of all its threads to a file when it gets SIGUSR1.
The signal is handled by the interpreter's fault handler, which works also while a thread hangs in native code. A rank on
another machine is asked through a file that its store looks for, and answers as long as it can run Python at all.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from raymill.paths import ENGINE
from raymill.record.folder import RunFolder

DUMP_TIMEOUT_S = 3.0
START_FACTOR = 5.0
"""The first step may take this many times longer than others: processes start and import before it."""

LOOP_FILE = str(ENGINE / "training" / "loop.py")
"""The file of the training loop: the thread that has it among its frames is the one that trains."""

COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "barrier", "recv", "send", "backward", "_engine_run_backward", "wait")
"""Functions in whose frames a rank waits for others."""


@dataclass(frozen=True)
class RankSeen:
    """What is known of one rank of a run that stands still.

    Attributes:
        rank: its number.
        pid: its process.
        status: "running", "stopped", "gone", "not started", or of a rank on another machine, "not answering".
        frame: the innermost frame of the training loop, "function (file:line)", or "" when no stack could be had.
    """

    rank: int
    pid: int
    status: str
    frame: str


def announce(folder: RunFolder, rank: int) -> None:
    """On a rank: leave the process id, and be ready to write stacks."""
    stacks = open(_stacks(folder, rank), "w")  # noqa: SIM115  stays open for the fault handler, as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    (folder.path / f"rank-{rank}.json").write_text(json.dumps({"pid": os.getpid()}))


def _stacks(folder: RunFolder, rank: int) -> Path:
    return folder.path / f"stacks-{rank}.txt"


def limit_s(stall_timeout_s: float, *, first_step_done: bool) -> float:
    """Seconds without an event after which an attempt counts as standing still."""
    return stall_timeout_s if first_step_done else stall_timeout_s * START_FACTOR


def look(folder: RunFolder, num_workers: int) -> list[RankSeen]:
    """Look at every rank of the attempt that stands still; their stacks are in the run's folder afterwards."""
    seen = []
    for rank in range(num_workers):
        file = folder.path / f"rank-{rank}.json"
        if not file.exists():
            seen.append(RankSeen(rank, 0, "not started", ""))
            continue
        announced = json.loads(file.read_text())
        pid = int(announced["pid"])
        if "host" in announced:
            dump = _ask(folder, rank)
            seen.append(RankSeen(rank, pid, "running" if dump else "not answering", loop_frame(dump)))
        else:
            status = _status(pid)
            seen.append(RankSeen(rank, pid, status, _dump(folder, rank, pid) if status == "running" else ""))
    return seen


def _ask(folder: RunFolder, rank: int) -> str:
    """The stacks of a rank on another machine; "" when none came in time."""
    _stacks(folder, rank).unlink(missing_ok=True)
    _wanted(folder, rank).touch()
    deadline_s = time.monotonic() + DUMP_TIMEOUT_S
    while time.monotonic() < deadline_s and _wanted(folder, rank).exists():
        time.sleep(0.05)
    return "" if _wanted(folder, rank).exists() else _stacks(folder, rank).read_text()


def wants_stacks(folder: RunFolder, rank: int) -> bool:
    """Whether the stacks of this rank, on another machine, are asked for."""
    return _wanted(folder, rank).exists()


def give_stacks(folder: RunFolder, rank: int, text: str) -> None:
    """Answer `wants_stacks`."""
    _stacks(folder, rank).write_text(text)
    _wanted(folder, rank).unlink(missing_ok=True)


def _wanted(folder: RunFolder, rank: int) -> Path:
    return folder.path / f"stacks-{rank}.wanted"


def _status(pid: int) -> str:
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"
    if status == psutil.STATUS_ZOMBIE:
        return "gone"
    return "stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "running"


def _dump(folder: RunFolder, rank: int, pid: int) -> str:
    path = _stacks(folder, rank)
    size = path.stat().st_size if path.exists() else 0
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
    deadline_s = time.monotonic() + DUMP_TIMEOUT_S
    seen = size
    # A dump is written in many pieces: it is whole once it has grown and grows no more.
    while time.monotonic() < deadline_s:
        time.sleep(0.05)
        now = path.stat().st_size if path.exists() else 0
        if now > size and now == seen:
            break
        seen = now
    return loop_frame(path.read_text()[size:] if path.exists() else "")


def loop_frame(dump: str) -> str:
    """The innermost frame of the thread that runs the training loop, from a fault handler's dump; "" if there is none."""
    for thread in re.split(r"\n\n|(?=^Thread |^Current thread )", dump, flags=re.MULTILINE):
        frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', thread)
        if any(file == LOOP_FILE for file, _, _ in frames):
            file, line, function = frames[0]
            return f"{function} ({Path(file).name}:{line})"
    return ""


def explain(seen: list[RankSeen], quiet_s: float, step: int) -> str:
    """One sentence: what stands still since when, who is the cause, and who waits for it."""
    at_fault = [rank for rank in seen if rank.status != "running"]
    waiting = [rank for rank in seen if rank.status == "running" and any(name in rank.frame for name in COLLECTIVES)]
    busy = [rank for rank in seen if rank.status == "running" and rank not in waiting]
    parts = [f"rank {rank.rank} (process {rank.pid}) is {rank.status}" for rank in at_fault]
    parts += [f"rank {rank.rank} (process {rank.pid}) is busy in {rank.frame or 'code outside the loop'}" for rank in busy]
    cause = f" for rank {(at_fault or busy)[0].rank}" if (at_fault or busy) else ""
    parts += [f"rank {rank.rank} waits{cause} in {rank.frame}" for rank in waiting]
    return f"no step for {quiet_s:.0f} s after step {step}: " + "; ".join(parts)
