"""Seconds from SIGKILL of a worker, or of the driver, to the end of the next optimizer step; and from the command to the first.

raymill with a driver that stands by, cold, and in its own process (resumed at once by a second command); torchrun with
elastic restarts, and the guide's way with `max_failures`; each saves a checkpoint every 20 steps. Run it from the project's root:

    python tests/benchmarks/recovery.py --data .raymill/data/mnist --out recovery.json

The others go on from their last checkpoint's epoch and train its rows again; raymill goes on with the next row.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from measure import LIMIT_S, PROJECT, STEPS_FOLDER, contest_arguments, contestants, enlarged, environment, report

POLL_S = 0.02
SETTLED_S = 5.0
"""After the first step, and once a driver stands by, before anything is killed."""

EVERY_STEPS = 20


@dataclass
class Contest:
    """One run, and what is known of it while it goes.

    Attributes:
        command: starts it.
        folder: its own, for its state.
        variables: its environment.
        victim: finds the process that is killed.
        ready: whether all is there that is to help.
        again: a second command that goes on with it, where nothing else does.
    """

    command: Sequence[str]
    folder: Path
    variables: dict[str, str]
    victim: Callable[[Contest], int]
    ready: Callable[[Contest], bool] = lambda contest: True
    again: Callable[[Contest], Sequence[str]] | None = None
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: Sequence[str]) -> None:
        """Start a command of it, in a process group of its own."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.processes.append(
            subprocess.Popen(command, cwd=PROJECT, env=self.variables, start_new_session=True, **quiet)  # type: ignore[call-overload]
        )

    def run(self) -> dict[str, Any]:
        """Start it, kill what is to be killed, and wait for the next step; then end it."""
        begun_s = time.time()
        self.start(self.command)
        try:
            first_s = self.wait(lambda: next(iter(self.first_steps_s()), None))
            settled_s = time.monotonic() + SETTLED_S
            self.wait(lambda: True if time.monotonic() > settled_s and self.ready(self) else None)
            killed_s = time.time()
            os.kill(self.victim(self), signal.SIGKILL)
            if self.again is not None:
                self.processes[-1].wait()
                self.start(self.again(self))
            next_s = self.wait(lambda: next((at for at in self.first_steps_s() if at > killed_s), None))
        finally:
            self.end()
        return {"seconds_to_first_step": round(first_s - begun_s, 2), "seconds_to_next_step": round(next_s - killed_s, 2)}

    def wait(self, look: Callable[[], Any]) -> Any:
        """Look until there is something."""
        until_s = time.monotonic() + LIMIT_S
        while (found := look()) is None:
            if time.monotonic() > until_s:
                raise SystemExit(f"nothing came of {' '.join(self.command)}")
            time.sleep(POLL_S)
        return found

    def first_steps_s(self) -> list[float]:
        """When each group of workers ended its first step."""
        for run in self.folder.glob("runs/*/events.jsonl"):
            lines = [line for line in run.read_text().splitlines() if '"first_step"' in line]
            return [float(json.loads(line)["time_s"]) for line in lines]
        steps = [file.read_text().split("\n") for file in (self.folder / "steps").glob("*")]
        return sorted(float(lines[0]) for lines in steps if len(lines) > 1)

    def end(self) -> None:
        """End all that belongs to it."""
        left = []
        for process in self.processes:
            if process.poll() is None:
                left += psutil.Process(process.pid).children(recursive=True)
        for process in psutil.process_iter():
            try:
                if str(self.folder) in process.environ().get("RAYMILL_HOME", ""):
                    left.append(process)
            except psutil.Error:
                continue
        for process in self.processes:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for other in left:
            try:
                other.kill()
            except psutil.NoSuchProcess:
                continue


# ---------------------------------------------------------------- who is killed


def raymill_rank(contest: Contest) -> int:
    """The process of rank 1."""
    (file,) = contest.folder.glob("runs/*/rank-1.json")
    return int(json.loads(file.read_text())["pid"])


def raymill_driver(contest: Contest) -> int:
    """The process that drives the run; in process, the command itself."""
    (file,) = contest.folder.glob("runs/*/driver.lock")
    return int(file.read_text())


def training_script(contest: Contest) -> int:
    """One of the processes that write down their steps."""
    return max(int(file.name) for file in (contest.folder / "steps").glob("*"))


def another_stands_by(contest: Contest) -> bool:
    """Whether both workers of a driver that stands by are ready: the kernel lists who waits for a lock."""
    gates = {f":{file.stat().st_ino} " for file in contest.folder.glob("raymill-*/gate")}
    waiting = [lock for lock in Path("/proc/locks").read_text().splitlines() if " -> " in lock]
    return sum(any(gate in lock for gate in gates) for lock in waiting) >= 2


# ---------------------------------------------------------------- the contest


def contest(name: str, options: argparse.Namespace, data: Path, folder: Path, variables: dict[str, str]) -> Contest:
    """The contestant of this name, in a folder of its own."""
    (folder / "steps").mkdir()
    own = {**variables, "RAYMILL_HOME": str(folder), "TMPDIR": str(folder), STEPS_FOLDER: str(folder / "steps")}
    commands = contestants(options, data)
    raymill = [*commands["raymill"], "--set", f"checkpoint.every_steps={EVERY_STEPS}"]
    restarts = [f"--checkpoint-every-steps={EVERY_STEPS}", f"--checkpoints={folder}"]
    if name == "guide":
        return Contest([*commands["guide"], *restarts], folder, own, training_script)
    if name == "torchrun":
        python, module, launcher, *others = commands["in memory"]
        return Contest([python, module, launcher, "--max-restarts=3", *others, *restarts], folder, own, training_script)
    if name == "raymill in process":
        command = [*commands["in process"], "--set", f"checkpoint.every_steps={EVERY_STEPS}"]

        def again(run: Contest) -> Sequence[str]:
            (found,) = folder.glob("runs/*/spec.json")
            return [sys.executable, "-m", "raymill", "train", "--resume", found.parent.name, "--in-process", "--json"]

        return Contest(command, folder, own, raymill_driver, again=again)
    victim = raymill_driver if "driver" in name else raymill_rank
    if "standby" in name:
        return Contest([*raymill, "--set", "retry.standby=true"], folder, own, victim, another_stands_by)
    return Contest([*raymill, "--set", "retry.standby=false"], folder, own, victim)


NAMES = (
    "raymill standby, worker killed",
    "raymill standby, driver killed",
    "raymill cold, worker killed",
    "raymill in process",
    "torchrun",
    "guide",
)


def main() -> None:
    """Run the contest and print its tables."""
    parser = contest_arguments(__doc__ or "")
    parser.set_defaults(epochs=200, copies=15)
    options = parser.parse_args()
    rounds: list[dict[str, dict[str, Any]]] = []
    with enlarged(options.data, options.copies) as data, environment() as variables:
        for number in range(1, options.repeats + 1):
            results = {}
            for name in NAMES:
                # Short, because Ray makes sockets in it.
                with tempfile.TemporaryDirectory(prefix="rr-", ignore_cleanup_errors=True) as folder:
                    results[name] = contest(name, options, data, Path(folder), variables).run()
                print(f"round {number}/{options.repeats}  {name:32}{results[name]}", file=sys.stderr, flush=True)
            rounds.append(results)
    report(rounds, "seconds_to_next_step", "guide", options.out)
    report(rounds, "seconds_to_first_step", "guide", None)


if __name__ == "__main__":
    main()
