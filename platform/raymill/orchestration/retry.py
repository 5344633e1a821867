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
    last = failures[-1]
    without_progress = [f for f in failures if f.step == last.step and f.cause == last.cause]
    return len(without_progress) <= budgets.get(last.cause, 0)
