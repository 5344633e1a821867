"""What ranks tell each other of a step, sent while the next one runs, so that no step waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields

import torch
import torch.distributed as dist

from raymill.parallel.clock import RankTime
from raymill.parallel.process_group import rank_and_world_size
from raymill.record.events import StepDone


@dataclass(frozen=True)
class FinishedStep:
    """What all ranks know of a step.

    Attributes:
        event: the complete step event.
        rows: that were trained on.
        ranks: where the time of each rank went.
        training_s: seconds of training when the step was done; None: not measured yet.
        wants_stop: whether to stop.
        out_of_time: whether the time of the job is spent.
    """

    event: StepDone
    rows: int
    ranks: list[RankTime]
    training_s: float | None
    wants_stop: bool
    out_of_time: bool


class PendingStep:
    """A step whose sums over ranks are on their way: rows, losses, times, and rank 0's wish to stop."""

    def __init__(
        self,
        event: StepDone,
        losses: Mapping[str, float],
        rows: int,
        own: RankTime,
        *,
        training_s: float | None,
        wants_stop: bool,
        out_of_time: bool,
    ) -> None:
        """Send this rank's part.

        Args:
            event: the event, with the metrics that all ranks know.
            losses: metric -> this rank's part of a sum over ranks.
            rows: rows this rank trained on.
            own: where its time went.
            training_s: seconds of training so far; None: not measured yet.
            wants_stop: whether this rank wants the run to stop.
            out_of_time: whether it finds the time of the job spent.
        """
        self._event, self._losses, self._training_s = event, list(losses), training_s
        rank, world_size = rank_and_world_size()
        # A sum in which only one rank has a part tells all the others that part.
        times = [value if other == rank else 0.0 for other in range(world_size) for value in astuple(own)]
        self._sum = torch.tensor(
            [float(rows), float(wants_stop), float(out_of_time), *losses.values(), *times], dtype=torch.float64
        )
        self._work = dist.all_reduce(self._sum, async_op=True) if dist.is_initialized() else None

    def finish(self) -> FinishedStep:
        """What all ranks together have to say."""
        if self._work is not None:
            self._work.wait()
        rows, stop, out_of_time, *others = self._sum.tolist()
        losses = dict(zip(self._losses, others, strict=False))
        times, size = others[len(losses) :], len(fields(RankTime))
        ranks = [RankTime(*times[start : start + size]) for start in range(0, len(times), size)]
        event = self._event.model_copy(update={"metrics": losses | self._event.metrics})
        return FinishedStep(event, int(rows), ranks, self._training_s, stop > 0, out_of_time > 0)
