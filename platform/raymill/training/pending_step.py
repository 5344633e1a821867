"""What ranks tell each other of a step, sent while the next one runs, so that no step waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from raymill.parallel.process_group import rank_and_world_size
from raymill.record.events import StepDone


@dataclass(frozen=True)
class FinishedStep:
    """What all ranks know of a step.

    Attributes:
        event: the complete step event.
        rows: that were trained on.
        forward_s: seconds that each rank took for its forward passes.
        wants_stop: whether to stop.
    """

    event: StepDone
    rows: int
    forward_s: list[float]
    wants_stop: bool


class PendingStep:
    """A step whose sums over ranks are on their way: rows, losses, times, and rank 0's wish to stop."""

    def __init__(self, event: StepDone, losses: Mapping[str, float], rows: int, forward_s: float, *, wants_stop: bool) -> None:
        """Send this rank's part.

        Args:
            event: the event, with the metrics that all ranks know.
            losses: metric -> this rank's part of a sum over ranks.
            rows: rows this rank trained on.
            forward_s: seconds it took for its forward passes.
            wants_stop: whether this rank wants the run to stop.
        """
        self._event, self._losses = event, list(losses)
        rank, world_size = rank_and_world_size()
        own_s = [forward_s if other == rank else 0.0 for other in range(world_size)]
        waited = [event.data_wait_share or 0.0 if other == rank else 0.0 for other in range(world_size)]
        values = [float(rows), float(wants_stop), *losses.values(), *own_s, *waited]
        self._world_size = world_size
        self._sum = torch.tensor(values, dtype=torch.float64)
        self._work = dist.all_reduce(self._sum, async_op=True) if dist.is_initialized() else None

    def finish(self) -> FinishedStep:
        """What all ranks together have to say; the share of time spent waiting for data is the longest of all ranks."""
        if self._work is not None:
            self._work.wait()
        rows, stop, *others = self._sum.tolist()
        losses = dict(zip(self._losses, others, strict=False))
        by_rank = others[len(losses) :]
        forward_s, waited = by_rank[: self._world_size], by_rank[self._world_size :]
        changes = {"metrics": losses | self._event.metrics}
        if self._event.data_wait_share is not None:
            changes["data_wait_share"] = max(waited)
        return FinishedStep(self._event.model_copy(update=changes), int(rows), forward_s, stop > 0)
