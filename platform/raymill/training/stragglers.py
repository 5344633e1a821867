"""Whether one rank computes slower than the others. All wait for the slowest in each step, so it sets everybody's speed.

What is compared is the time of the forward passes alone: in the backward pass ranks wait for each other. A slow rank is
named, once in an attempt, and nothing else is done about it: slow is not dead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

WINDOW_STEPS = 10
FACTOR = 2.0
MIN_LOST_S = 0.02
"""Seconds a step that a rank must lose the others to be worth a word; below it, chance decides who is slowest."""


@dataclass(frozen=True)
class Straggler:
    """A rank that computes slower than the others.

    Attributes:
        rank: its number.
        factor: how many times longer than the others' median its forward passes take.
        lost_s: seconds a step that the others wait for it.
    """

    rank: int
    factor: float
    lost_s: float


class StragglerDetector:
    """The last steps' forward times of all ranks."""

    def __init__(self) -> None:
        self._steps: deque[Sequence[float]] = deque(maxlen=WINDOW_STEPS)
        self._named: set[int] = set()

    def add(self, forward_s: Sequence[float]) -> Straggler | None:
        """Add a step, seconds by rank; returns a rank that has become slow and was not named before."""
        self._steps.append(forward_s)
        found = slowest_rank(list(self._steps)) if len(self._steps) == WINDOW_STEPS else None
        if found is None or found.rank in self._named:
            return None
        self._named.add(found.rank)
        return found


def slowest_rank(steps: Sequence[Sequence[float]]) -> Straggler | None:
    """The slowest rank over these steps [steps][ranks], in seconds, if it is slow enough to be named.

    Medians, so that a pause of a few steps, such as a checkpoint's, is no slowness.
    """
    usual_s = [median(rank_s) for rank_s in zip(*steps, strict=True)]
    if len(usual_s) < 2:
        return None
    rank = max(range(len(usual_s)), key=usual_s.__getitem__)
    others_s = median(usual_s[:rank] + usual_s[rank + 1 :])
    if usual_s[rank] < FACTOR * others_s or usual_s[rank] - others_s < MIN_LOST_S:
        return None
    return Straggler(rank, usual_s[rank] / max(others_s, 1e-6), usual_s[rank] - others_s)
