"""Keeps a run going: starts a driver, watches the run's events, and starts another driver when one dies.

Nothing of a dead attempt is used but what stands in the run's folder, so it does not matter what died: a worker, Ray's
train controller, the coordinator of the stream, Ray itself, or the driver. The next attempt goes on from the last commit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raymill import cluster, driver, errors, retry, stall
from raymill.checkpoint import read_pointer, read_record
from raymill.errors import Interrupted, RaymillError, StallError
from raymill.home import RunFolder
from raymill.retry import Cause, Failure
from raymill.spec import JobSpec
from raymill.tracking import append_event, read_events

Event = dict[str, Any]
Show = Callable[[Event], None]

POLL_S = 0.1
END_TIMEOUT_S = 2.0
TRACKER_STARTS = 3


def supervise(folder: RunFolder, spec: JobSpec, show: Show) -> dict[str, Any]:
    """Run attempts until the run is finished, interrupted, or cannot go on.

    Returns:
        The summary, with what tracking has to say.

    Raises:
        Interrupted: stopped on request, with its state saved.
        RaymillError: the cause of the last attempt's end, once its budget is spent.
    """
    rollbacks = spec.retry.rollbacks if spec.loop.on_nan == "rollback" else 0
    budgets = {
        Cause.NUMBERS: rollbacks,
        Cause.LOST_PROCESS: spec.retry.lost_processes,
        Cause.DRAIN: spec.retry.lost_processes,
        Cause.STALL: spec.retry.stalls,
        Cause.STORAGE: spec.retry.storage,
    }
    failures: list[Failure] = []
    tracker = Tracker(folder)
    watched = _Watched(folder, spec.loop.stall_timeout_s, show, tracker)
    try:
        with _stop_on_signal(folder):
            while (error := _attempt(folder, watched)) is not None:
                failures.append(Failure(retry.cause_of(error), committed_step(folder)))
                if folder.stop.exists() or not retry.go_on(failures, budgets):
                    raise error
                show({"kind": "restart", "cause": failures[-1].cause, "message": str(error), "step": failures[-1].step})
    except Interrupted:
        tracker.finish(show)
        raise
    except RaymillError as error:
        append_event(folder, {"kind": "stop", "reason": "failed", "message": str(error)})
        tracker.finish(show)
        raise
    summary: dict[str, Any] = json.loads(folder.summary.read_text())
    return summary | tracker.finish(show)


def committed_step(folder: RunFolder) -> int:
    """The step of the newest checkpoint that is pointed at, or 0."""
    pointer = read_pointer(folder.checkpoints)
    try:
        return int(read_record(folder.checkpoints / pointer.latest)["step"]) if pointer else 0
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def _attempt(folder: RunFolder, watched: _Watched) -> RaymillError | None:
    """Start a driver and watch it to its end; returns why it failed, or None when the run is finished."""
    folder.outcome.unlink(missing_ok=True)
    with open(folder.ray_log, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "raymill.driver", str(folder.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Ctrl-C is for the supervisor, which asks the workers to stop; the driver must live until they have.
            start_new_session=True,
        )
    stalled: RaymillError | None = None
    try:
        watched.begin()
        while process.poll() is None and stalled is None:
            watched.look()
            stalled = watched.stalled()
            time.sleep(POLL_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        watched.look()
        cluster.end_session(process.pid, END_TIMEOUT_S if stalled is None else 0.0)
    if stalled is not None:
        return stalled
    if process.returncode == driver.FINISHED:
        return None
    if process.returncode == driver.INTERRUPTED:
        raise Interrupted(folder.run_id, committed_step(folder))
    if folder.outcome.exists():
        return errors.from_record(json.loads(folder.outcome.read_text()))
    how = signal.Signals(-process.returncode).name if process.returncode < 0 else f"exit code {process.returncode}"
    return errors.WorkerError(
        f"the driver (process {process.pid}) ended with {how}; its last words are in {folder.ray_log}",
        cause=Cause.LOST_PROCESS,
    )


class _Watched:
    """The events of a run, passed on as they come, and the time since the last one."""

    def __init__(self, folder: RunFolder, stall_timeout_s: float, show: Show, tracker: Tracker) -> None:
        self._folder, self._stall_timeout_s, self._show, self._tracker = folder, stall_timeout_s, show, tracker
        self._offset = folder.events.stat().st_size if folder.events.exists() else 0
        self.begin()

    def begin(self) -> None:
        """Say that an attempt begins."""
        self._last_s = time.monotonic()
        self._first_step_done = False
        self._ended = False
        self._step, self._num_workers = 0, 0

    def look(self) -> None:
        """Pass on what is new."""
        events, self._offset = read_events(self._folder.events, self._offset)
        for event in events:
            self._last_s = time.monotonic()
            self._step = event.get("step", self._step)
            self._num_workers = event.get("num_workers", self._num_workers)
            self._ended = event["kind"] in ("end", "stop")
            if event["kind"] == "first_step":
                self._first_step_done = True
                self._tracker.start()
            self._show(event)

    def stalled(self) -> StallError | None:
        """What to say when nothing has happened for too long, else None."""
        quiet_s = time.monotonic() - self._last_s
        limit_s = stall.limit_s(self._stall_timeout_s, first_step_done=self._first_step_done)
        if self._ended or quiet_s < limit_s:
            return None
        seen = stall.look(self._folder, self._num_workers)
        return StallError(f"{stall.explain(seen, quiet_s, self._step)}. Stacks of all ranks: {self._folder.path}/stacks-*.txt")


@contextmanager
def _stop_on_signal(folder: RunFolder) -> Iterator[None]:
    """Within this, SIGINT and SIGTERM ask the workers to save and stop; a second SIGINT stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if folder.stop.exists() and number == signal.SIGINT:
            raise Interrupted(folder.run_id, committed_step(folder))
        folder.stop.touch()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Tracker:
    """The process that delivers the run's events to MLflow. Started once training goes, so that it delays nothing."""

    def __init__(self, folder: RunFolder) -> None:
        """Of this run."""
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start it if it does not run: at low priority, and apart from this terminal's Ctrl-C."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        with open(self._folder.tracking_log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "raymill.tracking", str(self._folder.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_be_nice,
            )
        return self._process

    def finish(self, show: Show) -> dict[str, Any]:
        """Wait until everything is delivered; returns what the summary says about it."""
        show({"kind": "delivering"})
        code = None
        for _ in range(TRACKER_STARTS):
            code = self.start().wait()
            # Below zero: killed by a signal. What it has not delivered is in its queue still.
            if code >= 0:
                break
        found: dict[str, Any] = {"delivered_to_mlflow": code == 0}
        if self._folder.version.exists():
            found["model"] = json.loads(self._folder.version.read_text())
        if code:
            found["note"] = f"MLflow did not take everything (see {self._folder.tracking_log}); the queue is kept"
        return found


def _be_nice() -> None:
    os.nice(5)
