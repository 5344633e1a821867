"""The executor on Ray, on this machine or a cluster: starts a driver, watches the run's events, starts another when one dies.

It does not matter what died: a worker, Ray's train controller, the coordinator of the stream, Ray itself, or the driver. The next
attempt goes on from the last commit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from raymill import errors
from raymill.errors import Interrupted, RaymillError, StallError
from raymill.files import private, read_record
from raymill.orchestration.attempts import Show, committed_step, run_attempts, stop_on_signal
from raymill.orchestration.on_ray import driver, session_folder
from raymill.orchestration.prepare import Prepared
from raymill.orchestration.retry import Cause
from raymill.orchestration.tracker import Tracker
from raymill.paths import project_root
from raymill.record import stacks
from raymill.record.events import FirstStepDone, RunFinished, RunStopped, append_event, read_events
from raymill.record.folder import RunFolder

POLL_S = 0.1
END_TIMEOUT_S = 2.0


def supervise(folder: RunFolder, prepared: Prepared, show: Show) -> dict[str, Any]:
    """Run attempts until the run is finished, interrupted, or cannot go on.

    Returns:
        The summary, with what tracking has to say.

    Raises:
        Interrupted: stopped on request, with its state saved.
        RaymillError: the cause of the last attempt's end, once its budget is spent.
    """
    tracker = Tracker(folder)
    monitor = _EventMonitor(folder, prepared.spec.loop.stall_timeout_s, show, tracker)
    try:
        with stop_on_signal(folder):
            run_attempts(folder, prepared.spec, partial(_attempt, folder, monitor), show)
    except Interrupted:
        tracker.finish(show)
        raise
    except RaymillError as error:
        append_event(folder, RunStopped(reason="failed", message=str(error)))
        tracker.finish(show)
        raise
    return read_record(folder.summary) | tracker.finish(show)


def _attempt(folder: RunFolder, monitor: _EventMonitor) -> RaymillError | None:
    """Start a driver and watch it to its end; returns why it failed, or None when the run is finished."""
    folder.failure.unlink(missing_ok=True)
    with session_folder.new_session() as session:
        return _drive(folder, monitor, session)


def _drive(folder: RunFolder, monitor: _EventMonitor, session: Path) -> RaymillError | None:
    with open(folder.ray_log, "ab", opener=private) as log:
        process = subprocess.Popen(
            # -P: no code from the current folder. Ray lets its workers import from there, so it is the project's root.
            [sys.executable, "-P", "-m", "raymill.orchestration.on_ray.driver", str(folder.path)],
            cwd=project_root(),
            env={**os.environ, session_folder.VARIABLE: str(session)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Ctrl-C is for the supervisor, which asks the workers to stop; the driver must live until they have.
            start_new_session=True,
        )
    stalled: RaymillError | None = None
    try:
        monitor.begin()
        while process.poll() is None and stalled is None:
            monitor.poll()
            stalled = monitor.find_stall()
            time.sleep(POLL_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        monitor.poll()
        session_folder.end_session(session, END_TIMEOUT_S if stalled is None else 0.0)
    if stalled is not None:
        return stalled
    if process.returncode == driver.FINISHED:
        return None
    if process.returncode == driver.INTERRUPTED:
        raise Interrupted(folder.run_id, committed_step(folder))
    if folder.failure.exists():
        return errors.from_record(read_record(folder.failure))
    how = signal.Signals(-process.returncode).name if process.returncode < 0 else f"exit code {process.returncode}"
    return errors.WorkerError(
        f"the driver (process {process.pid}) ended with {how}; what it printed last is in {folder.ray_log}",
        cause=Cause.LOST_PROCESS,
    )


class _EventMonitor:
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

    def poll(self) -> None:
        """Pass on what is new."""
        events, self._offset = read_events(self._folder.events, self._offset)
        for event in events:
            self._last_s = time.monotonic()
            self._step = getattr(event, "step", self._step)
            self._num_workers = getattr(event, "num_workers", self._num_workers)
            self._ended = isinstance(event, RunFinished | RunStopped)
            if isinstance(event, FirstStepDone):
                self._first_step_done = True
                self._tracker.start()
            self._show(event)

    def find_stall(self) -> StallError | None:
        """What to say when nothing has happened for too long, else None."""
        quiet_s = time.monotonic() - self._last_s
        limit_s = stacks.limit_s(self._stall_timeout_s, first_step_done=self._first_step_done)
        if self._ended or quiet_s < limit_s:
            return None
        seen = stacks.look(self._folder, self._num_workers)
        return StallError(f"{stacks.explain(seen, quiet_s, self._step)}. Stacks of all ranks: {self._folder.path}/stacks-*.txt")
