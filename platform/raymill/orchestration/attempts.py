"""Attempt after attempt, until a run is finished, stopped, or cannot go on; the same for every executor.

Nothing of a dead attempt is used but what stands in the run's folder, so it does not matter what died.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raymill.checkpoint.directory import read_pointer, read_state
from raymill.config.spec import JobSpec
from raymill.errors import CheckpointError, Interrupted, RaymillError
from raymill.orchestration import retry
from raymill.orchestration.retry import Failure
from raymill.record.events import AttemptFailed, Event, RunStopped, StepDone, append_event, read_events
from raymill.record.folder import RunFolder

POLL_S = 0.1

Show = Callable[[Event], None]
"""Is given every event of a run as it happens, for people to see."""


def run_attempts(folder: RunFolder, spec: JobSpec, attempt: Callable[[], RaymillError | None], show: Show) -> None:
    """Call `attempt` until it returns None, for a run that is finished.

    Args:
        attempt: makes one attempt; returns why it failed.

    Raises:
        Interrupted: from an attempt that was asked to stop, its state saved; or in place of another one, which goes on from the
            last commit whenever the run is resumed.
        RaymillError: the cause of the last attempt's end, once its budget is spent.
    """
    failures: list[Failure] = []
    began = folder.events.stat().st_size if folder.events.exists() else 0
    while (error := attempt()) is not None:
        failures.append(Failure(retry.cause_of(error), committed_step(folder)))
        if not retry.go_on(failures, retry.budgets(spec)):
            raise error
        events, began = read_events(folder.events, began)
        last_step = max((event.step for event in events if isinstance(event, StepDone)), default=None)
        last, pause_s = failures[-1], retry.pause_s(failures)
        show(AttemptFailed(cause=last.cause, message=str(error), step=last.step, last_step=last_step, pause_s=pause_s))
        _wait(folder, pause_s)
        if folder.stop_request.exists():
            append_event(folder, RunStopped(reason="interrupted", message=""))
            raise Interrupted(folder.run_id, last.step)


def _wait(folder: RunFolder, pause_s: float) -> None:
    """Wait that long, or until the run is asked to stop."""
    until_s = time.monotonic() + pause_s
    while time.monotonic() < until_s and not folder.stop_request.exists():
        time.sleep(POLL_S)


def committed_step(folder: RunFolder) -> int:
    """The step of the newest checkpoint that is pointed at, or 0."""
    pointer = read_pointer(folder.checkpoints)
    try:
        return int(read_state(folder.checkpoints / pointer.latest, "step")["step"]) if pointer else 0
    except CheckpointError:
        return 0


@contextmanager
def stop_on_signal(folder: RunFolder) -> Iterator[None]:
    """Within this, SIGINT and SIGTERM ask the workers to save and stop; a second SIGINT stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if folder.stop_request.exists() and number == signal.SIGINT:
            raise Interrupted(folder.run_id, committed_step(folder))
        folder.stop_request.touch()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
