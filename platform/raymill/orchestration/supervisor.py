"""The executor on Ray, on this machine or a cluster: starts a driver, watches the run's events, starts another when one dies.

It does not matter what died: a worker, Ray's train controller, the coordinator of the stream, Ray itself, or the driver. The next
attempt goes on from the last commit. In a long run another driver stands by with a Ray of its own, all imported and its workers
waiting, so that the next step is seconds away and not the half a minute that a cold start takes.
"""

from __future__ import annotations

import signal
import time
from contextlib import AbstractContextManager, closing
from typing import Any

import psutil

from raymill import errors
from raymill.errors import Interrupted, RaymillError, StallError
from raymill.files import read_record
from raymill.orchestration.attempts import Show, committed_step, run_attempts, stop_on_signal
from raymill.orchestration.cluster_facts import address
from raymill.orchestration.on_ray.driver import FINISHED, INTERRUPTED
from raymill.orchestration.on_ray.driver_process import DriverProcess, Outlook, decide_standby
from raymill.orchestration.on_ray.group import Group
from raymill.orchestration.prepare import Prepared
from raymill.orchestration.retry import Cause, budgets
from raymill.orchestration.tracker import Tracker
from raymill.preflight.process import Look, beside
from raymill.record import stacks
from raymill.record.events import (
    FirstStepDone,
    RunFinished,
    RunStopped,
    StageReached,
    StandbyDecided,
    append_event,
    read_events,
)
from raymill.record.folder import RunFolder

ready: DriverProcess | None = None
"""A driver that this process started before it knew its run, with workers that wait for it; see `cluster.on_head.ready`."""

POLL_S = 0.1
END_TIMEOUT_S = 2.0
SETTLED_S = 3.0
"""Seconds after an attempt's first step from which its speed says something."""


def preflight(folder: RunFolder, prepared: Prepared) -> AbstractContextManager[Look]:
    """Try the job's own code in a process of its own while the driver and Ray start."""
    return beside(folder, prepared.where)


def supervise(folder: RunFolder, prepared: Prepared, show: Show, look: Look) -> dict[str, Any]:
    """Run attempts until the run is finished, interrupted, or cannot go on.

    Returns:
        The summary, with what tracking has to say.

    Raises:
        Refusal: the job's own code was found wrong by `look`, and there was no step yet.
        Interrupted: stopped on request, with its state saved.
        RaymillError: the cause of the last attempt's end, once its budget is spent.
    """
    tracker = Tracker(folder)
    monitor = _EventMonitor(folder, prepared.spec.loop.stall_timeout_s, show, tracker)
    try:
        with stop_on_signal(folder), closing(_Drivers(folder, prepared, monitor, look)) as drivers:
            run_attempts(folder, prepared.spec, drivers.attempt, show)
    except Interrupted:
        tracker.finish(show)
        raise
    except RaymillError as error:
        append_event(folder, RunStopped(reason="failed", message=str(error)))
        tracker.finish(show)
        raise
    return read_record(folder.summary) | tracker.finish(show)


class _Drivers:
    """The driver whose turn it is, and in a long run the one that stands by."""

    def __init__(self, folder: RunFolder, prepared: Prepared, monitor: _EventMonitor, look: Look) -> None:
        self._folder, self._spec, self._monitor, self._look = folder, prepared.spec, monitor, look
        self._standby = _take_ready(Group.of(prepared.plan, prepared.spec))
        self._wants_standby = address() is None

    def close(self) -> None:
        """End the one that stands by."""
        if self._standby is not None:
            self._standby.end(0.0)
            self._standby = None

    def attempt(self) -> RaymillError | None:
        """Let a driver have its turn and watch it to its end; returns why it failed, or None when the run is finished."""
        self._folder.failure.unlink(missing_ok=True)
        driver = self._next()
        stalled: RaymillError | None = None
        try:
            self._monitor.begin()
            # A driver that has said why it failed need not be waited for: ending Ray takes it a while.
            while driver.exit_code is None and stalled is None and not self._folder.failure.exists():
                self._monitor.poll()
                self._look(self._monitor.trained)
                stalled = self._monitor.find_stall()
                self._look_after_standby(driver)
                time.sleep(POLL_S)
        finally:
            ended = driver.exit_code in (FINISHED, INTERRUPTED)
            driver.end(END_TIMEOUT_S if ended else 0.0)
            self._monitor.poll()
        return stalled or self._why_it_ended(driver)

    def _next(self) -> DriverProcess:
        """The driver that stands by, its turn given, or a new one."""
        driver, self._standby = self._standby, None
        if driver is not None and driver.exit_code is not None:
            driver.end(0.0)
            driver = None
        stage = "starting Ray"
        if driver is not None:
            stage = "workers that stood ready take over" if driver.group else "the driver that stood by takes over"
        append_event(self._folder, StageReached(stage=stage))
        if driver is None:
            return DriverProcess(self._folder)
        driver.give_turn(self._folder)
        return driver

    def _look_after_standby(self, driver: DriverProcess) -> None:
        """Start a driver that stands by once that is worth it; one that died is not replaced before the next attempt."""
        left_s = self._monitor.left_s() if self._standby is None and self._wants_standby else None
        if left_s is None:
            return
        outlook = Outlook(
            wanted=self._spec.retry.standby,
            may_go_on=any(budgets(self._spec).values()),
            left_s=left_s,
            taken_bytes=driver.memory_bytes(),
            free_bytes=psutil.virtual_memory().available,
        )
        self._wants_standby, reason = decide_standby(outlook)
        append_event(self._folder, StandbyDecided(started=self._wants_standby, reason=reason))
        if self._wants_standby:
            self._standby = DriverProcess(self._folder, standing_by=True)

    def _why_it_ended(self, driver: DriverProcess) -> RaymillError | None:
        folder, code = self._folder, driver.exit_code
        if folder.failure.exists():
            return errors.from_record(read_record(folder.failure))
        if code == FINISHED:
            return None
        if code == INTERRUPTED:
            raise Interrupted(folder.run_id, committed_step(folder))
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return errors.WorkerError(
            f"the driver (process {driver.pid}) ended with {how}; what it printed last is in {folder.ray_log}",
            cause=Cause.LOST_PROCESS,
        )


def _take_ready(group: Group) -> DriverProcess | None:
    """The driver that this process has made ready, where its workers are those that the run needs."""
    global ready
    driver, ready = ready, None
    if driver is not None and driver.group != group:
        driver.end(0.0)
        return None
    return driver


class _EventMonitor:
    """The events of a run, passed on as they come, and the time since the last one."""

    def __init__(self, folder: RunFolder, stall_timeout_s: float, show: Show, tracker: Tracker) -> None:
        self._folder, self._stall_timeout_s, self._show, self._tracker = folder, stall_timeout_s, show, tracker
        self._offset = folder.events.stat().st_size if folder.events.exists() else 0
        self.trained = False
        self.begin()

    def begin(self) -> None:
        """Say that an attempt begins."""
        self._last_s = time.monotonic()
        self._first_step_s: float | None = None
        self._ended = False
        self._first_step, self._step, self._num_steps, self._num_workers = 0, 0, 0, 0

    def poll(self) -> None:
        """Pass on what is new."""
        events, self._offset = read_events(self._folder.events, self._offset)
        for event in events:
            self._last_s = time.monotonic()
            self._step = getattr(event, "step", self._step)
            self._num_workers = getattr(event, "num_workers", self._num_workers)
            self._num_steps = getattr(event, "num_total_steps", self._num_steps)
            self._ended = isinstance(event, RunFinished | RunStopped)
            if isinstance(event, FirstStepDone):
                self._first_step_s, self._first_step = time.monotonic(), event.step
                self.trained = True
                self._tracker.start()
            self._show(event)

    @property
    def first_step_done(self) -> bool:
        """Whether the attempt trains."""
        return self._first_step_s is not None

    def left_s(self) -> float | None:
        """Seconds that the run will still take at the speed of this attempt; None in its first seconds."""
        if self._first_step_s is None or time.monotonic() - self._first_step_s < SETTLED_S or self._step <= self._first_step:
            return None
        return (time.monotonic() - self._first_step_s) / (self._step - self._first_step) * (self._num_steps - self._step)

    def find_stall(self) -> StallError | None:
        """What to say when nothing has happened for too long, else None."""
        quiet_s = time.monotonic() - self._last_s
        limit_s = stacks.limit_s(self._stall_timeout_s, first_step_done=self.first_step_done)
        if self._ended or quiet_s < limit_s:
            return None
        seen = stacks.look(self._folder, self._num_workers)
        return StallError(f"{stacks.explain(seen, quiet_s, self._step)}. Stacks of all ranks: {self._folder.path}/stacks-*.txt")
