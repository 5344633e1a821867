"""Where an attempt's time goes, and how much of it the whole group stood still because a rank had no rows yet.

Ranks go in step: each gets its rows ready, and in the exchange of gradients none goes on before the last one has come. So what
waiting for rows costs is no single rank's wait (one that waits little for its rows waits for the others in the exchange), and a
wait costs nothing where another rank would have come as late for other reasons.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RankTime:
    """One rank's time in a step, in seconds.

    Attributes:
        wait_s: waiting for rows, since all ranks were together last.
        busy_s: everything else from there to where its rows were ready: collating, copying to the device, reporting, saving.
        forward_s: forward passes.
    """

    wait_s: float
    busy_s: float
    forward_s: float = 0.0


def held_up_s(ranks: Sequence[RankTime]) -> float:
    """How many seconds sooner the last rank would have been ready, had all rows been there."""
    return max(rank.wait_s + rank.busy_s for rank in ranks) - max(rank.busy_s for rank in ranks)


class Clock:
    """The time of one attempt on one rank, from the end of its first step on. Evaluations are kept apart from training.

    Attributes:
        training_held_up_s: seconds of training in which all ranks were held up by one that waited for rows.
        evaluation_held_up_s: the same of evaluations.
        evaluation_s: seconds in evaluations.
    """

    def __init__(self, now_s: Callable[[], float] = time.perf_counter) -> None:
        """A clock that has not started."""
        self.training_held_up_s = 0.0
        self.evaluation_held_up_s = 0.0
        self.evaluation_s = 0.0
        self._now_s = now_s
        self._started_s: float | None = None
        self._first_row = 0
        self._together_s = now_s()
        self._waited_s = 0.0

    @property
    def started(self) -> bool:
        """Whether the first step is done."""
        return self._started_s is not None

    def start(self, position: int, waited_s: float) -> None:
        """The first step is done, at this position."""
        self._started_s = self._now_s()
        self._first_row = position
        self.gather(waited_s)

    def gather(self, waited_s: float) -> None:
        """All ranks are together now; this one has waited `waited_s` seconds for rows since the attempt began."""
        self._together_s, self._waited_s = self._now_s(), waited_s

    def apart(self, waited_s: float) -> RankTime:
        """This rank's time since all were together."""
        wait_s = waited_s - self._waited_s
        return RankTime(wait_s, self._now_s() - self._together_s - wait_s)

    def training_s(self) -> float:
        """Seconds of training up to when all ranks were together last; what comes after the last step is none."""
        return 0.0 if self._started_s is None else self._together_s - self._started_s - self.evaluation_s

    def rows_per_s(self, position: int) -> float:
        """Rows trained on in a second of training, when all ranks are together at this position."""
        return (position - self._first_row) / max(self.training_s(), 1e-9)


def share(part_s: float, whole_s: float) -> float:
    """A part of some time, from 0 to 1. Ranks' clocks are read at slightly different moments, so a part may seem to be more."""
    return min(1.0, max(0.0, part_s / whole_s)) if whole_s > 0 else 0.0
