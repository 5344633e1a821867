"""Whether a run goes on after a failure: a pure decision from its cause and what happened before.

Budgets are kept per cause, because a machine that loses processes says nothing about a disk that is full; and a budget is
whole again as soon as the run has made progress, because a long run may well lose more processes than a short one. What
would only fail again, such as an error in the job's own code, is never tried again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from raymill.config.spec import JobSpec
from raymill.errors import CheckpointError, DataError, InputError, NumberError, RaymillError, StallError, WorkerError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 40.0
"""Before the attempt that follows two without progress, and before any."""


class Cause(StrEnum):
    """Why an attempt ended."""

    LOST_PROCESS = "lost process"
    DRAIN = "drain"
    STALL = "stall"
    STORAGE = "storage"
    MEMORY = "memory"
    NUMBERS = "numbers"
    DATA = "data"
    CODE = "code"


@dataclass(frozen=True)
class Failure:
    """One attempt's end.

    Attributes:
        cause: why.
        step: the last committed step when it ended.
    """

    cause: Cause
    step: int


def cause_of(error: RaymillError | None) -> Cause:
    """The cause of an attempt's end; None stands for a driver that died without a word."""
    if error is None:
        return Cause.LOST_PROCESS
    if isinstance(error, WorkerError):
        return Cause(error.cause)
    kinds = {
        StallError: Cause.STALL,
        CheckpointError: Cause.STORAGE,
        NumberError: Cause.NUMBERS,
        DataError: Cause.DATA,
        InputError: Cause.CODE,
    }
    return next((cause for kind, cause in kinds.items() if isinstance(error, kind)), Cause.CODE)


def budgets(spec: JobSpec) -> dict[Cause, int]:
    """Cause -> attempts that may end so without progress between them, as the job says."""
    return {
        Cause.NUMBERS: spec.retry.rollbacks if spec.loop.on_nan == "rollback" else 0,
        Cause.LOST_PROCESS: spec.retry.lost_processes,
        Cause.DRAIN: spec.retry.lost_processes,
        Cause.STALL: spec.retry.stalls,
        Cause.STORAGE: spec.retry.storage,
    }


def go_on(failures: Sequence[Failure], budgets: Mapping[Cause, int]) -> bool:
    """Whether to start another attempt after the last of these failures.

    Args:
        failures: all ends of attempts so far, oldest first; at least one.
        budgets: cause -> attempts that may end so without progress between them; a cause that is not there has none.
    """
    return _num_without_progress(failures) <= budgets.get(failures[-1].cause, 0)


def pause_s(failures: Sequence[Failure]) -> float:
    """Seconds to wait before the next attempt: none behind progress, then longer each time.

    A Ray cluster takes a node that is gone for one that is there until it has missed its heartbeats, for 13 s as Ray comes: a few
    attempts within that time may all be given what was there.
    """
    again = _num_without_progress(failures) - 1
    return min(FIRST_PAUSE_S * 2 ** (again - 1), LONGEST_PAUSE_S) if again > 0 else 0.0


def _num_without_progress(failures: Sequence[Failure]) -> int:
    last = failures[-1]
    return sum(one.step == last.step and one.cause == last.cause for one in failures)
