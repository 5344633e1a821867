"""One training step on one rank: its rows, their gradients, the optimizers, what the task does behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from raymill import faults
from raymill.data.feed import Feed
from raymill.data.rows import ROW_ID
from raymill.data.seeds import COLLATE, HOOK, STEP, seed_everything
from raymill.errors import NumberError
from raymill.own_code import contracts
from raymill.parallel.buffers import SavedBuffers
from raymill.parallel.clock import Clock, RankTime
from raymill.parallel.ddp import DistributedObjective
from raymill.parallel.gradients import compute_gradients
from raymill.parallel.microbatch import Microbatch
from raymill.parallel.process_group import all_gather, all_gather_integers, broadcast_buffers
from raymill.record.events import StepRefused
from raymill.record.store import Report, ResumePoint
from raymill.task import TRAIN, Now
from raymill.training.assembly import Job, WorkerContext
from raymill.training.batch import to_device
from raymill.training.state import TrainState
from raymill.training.steps import TrainStep, moment

MAX_SHOWN_ROWS = 5
"""Of a batch, in a message."""


@dataclass
class TakenStep:
    """What one rank has to say of a step.

    Attributes:
        losses: metric -> this rank's part of a sum over ranks.
        metrics: metric -> value that all ranks know.
        rows: that this rank trained on; 0 where the step was passed over or refused.
        time: where the rank's time went.
    """

    losses: dict[str, float]
    metrics: dict[str, float]
    rows: int
    time: RankTime


class StepTaker:
    """Takes training steps on one rank: changes the state, and takes its rows from the feed."""

    def __init__(
        self,
        job: Job,
        context: WorkerContext,
        state: TrainState,
        point: ResumePoint,
        feed: Feed,
        clock: Clock,
        report: Report,
    ) -> None:
        self.job, self.context, self.state, self.point = job, context, state, point
        self.feed, self.clock, self.report = feed, clock, report

    def take(self, step: TrainStep) -> TakenStep:
        """Train on one global batch, or pass over it if it is one that spoiled the numbers before.

        Raises:
            NumberError: the gradient is not a number, and the policy is not to skip the batch.
        """
        number = self.job.order.step(step.position)
        ids: list[np.ndarray] = []
        microbatches = self.take_microbatches(step, ids)
        taken = TakenStep({}, {}, 0, self.clock.apart(self.feed.wait_s))
        batch_rows = self.job.shardings[TRAIN].batch_size(step.batch)
        rows = self.count_good_rows(microbatches, batch_rows)
        skipped = step.position in self.point.skipped_positions or not rows
        for index, objective in enumerate(self.state.objectives):
            if not skipped and objective.objective.is_due(number):
                skipped = not self.minimise(index, objective, microbatches, rows, step, ids, taken)
            for group in self.state.optimizers[objective.name]:
                group.schedule.advance(epoch_ended=step.position % self.job.order.train.num_rows == 0)
        if not skipped:
            call_hook(self.job, self.state, "after_step", moment(self.job.order, step))
            if self.state.average:
                self.state.average.add(number)
            taken.rows = sum(microbatch.count for microbatch in microbatches)
        self.clock.gather(self.feed.wait_s)
        self.state.position = step.position
        self.state.rows_skipped += batch_rows - (0 if skipped else rows)
        taken.time = replace(taken.time, forward_s=sum(objective.clock.take() for objective in self.state.objectives))
        return taken

    def take_microbatches(self, step: TrainStep, ids: list[np.ndarray]) -> list[Microbatch]:
        """The next training rows of this rank by shard, on its device; their row ids are added to `ids`."""
        found = []
        for shard, count in self.job.shardings[TRAIN].shards(step.batch, self.context.rank):
            rows = self.feed.take(TRAIN, step.epoch, count)
            ids.append(np.asarray(rows[ROW_ID]))
            if self.job.spec.loop.record_order and count:
                record = {"attempt": self.point.attempt, "position": step.position, "rows": ids[-1].tolist()}
                self.context.store.record_order(record)
            if len(ids[-1]):
                seed_everything(self.job.spec.loop.seed, COLLATE, step.position, shard)
                batch = to_device(self.job.collate(rows), self.context.device)
                found.append(Microbatch(shard, len(ids[-1]), batch, weight=len(ids[-1])))
        return found

    def count_good_rows(self, microbatches: list[Microbatch], batch_rows: int) -> int:
        """The rows of a global batch on all ranks: all of them, unless bad ones may be left out."""
        if not self.job.spec.bad_rows.lenient:
            return batch_rows
        own = sum(microbatch.count for microbatch in microbatches)
        return sum(int(count) for count in all_gather(torch.tensor(own)))

    def minimise(
        self,
        index: int,
        objective: DistributedObjective,
        microbatches: list[Microbatch],
        rows: int,
        step: TrainStep,
        ids: list[np.ndarray],
        taken: TakenStep,
    ) -> bool:
        """One optimizer step of one objective; adds to what was taken. Returns False for a step that was refused."""
        name, spec = objective.name, self.job.spec
        groups, number = self.state.optimizers[name], self.job.order.step(step.position)
        for group in groups:
            group.optimizer.zero_grad(set_to_none=True)
        self.state.restore_modes()
        saved = SavedBuffers.of_rank_zero(self.state.model) if spec.loop.on_nan == "skip" else None
        with objective.in_step(moment(self.job.order, step)):
            loss = compute_gradients(
                objective,
                microbatches,
                rows,
                self.job.shardings[TRAIN].num_shards,
                lambda shard: seed_everything(spec.loop.seed, STEP, step.position, shard, index),
                scale=self.state.loss_scales[name].scale,
            )
        faults.point("after_backward")
        for group in groups:
            group.hold_back(number)
        norm = objective.strategy.norm(objective.parameters)
        # The one time in a step that the device is waited for.
        norm_value, *sums = torch.cat([norm.double().reshape(1), loss.sums]).tolist()
        finite = math.isfinite(norm_value)
        scale = self.state.loss_scales[name]
        if spec.loop.precision == "fp16":
            taken.metrics[f"train/{contracts.metric_name(name, 'loss_scale')}"] = scale.scale
            self.state.loss_scales[name] = scale.behind(finite=finite)
            if not finite and scale.scale > 1:
                # The scale was too large, and not the batch bad: the next step has a smaller one.
                return True
        if not finite:
            self.refuse(step, name, norm_value, ids)
            if saved is not None:
                saved.restore()
            return False
        rates = {f"learning_rate{f'_{place}' if place > 1 else ''}": group.learning_rate for place, group in enumerate(groups, 1)}
        for group in groups:
            group.step(number)
        faults.point("after_optimizer")
        if loss.weight:
            labels = [f"train/{contracts.metric_name(name, part)}" for part in loss.names]
            taken.losses |= {label: value / loss.weight for label, value in zip(labels, sums, strict=True)}
        taken.metrics[f"train/{contracts.metric_name(name, 'gradient_norm')}"] = norm_value
        taken.metrics |= {f"train/{contracts.metric_name(name, quantity)}": rate for quantity, rate in rates.items()}
        return True

    def refuse(self, step: TrainStep, name: str, norm: float, ids: list[np.ndarray]) -> None:
        """Do not take a step whose gradient is not a number; the weights are as before. All ranks see the same norm.

        Raises:
            NumberError: unless the policy is to skip the batch.
        """
        number, policy = self.job.order.step(step.position), self.job.spec.loop.on_nan
        row_ids = all_gather_integers(np.concatenate(ids) if ids else np.zeros(0, np.int64))
        self.report(StepRefused(step=number, epoch=step.epoch, position=step.position, rows=row_ids, policy=policy))
        if policy != "skip":
            raise NumberError(
                f"step {number} (epoch {step.epoch}, batch {step.batch}): the gradient of objective {name!r} has norm {norm}. "
                f"Its step was not taken. Rows of the batch: {_few(row_ids)}. Lower optimizer.lr, set optimizer.max_grad_norm, "
                "look for NaN in the rows with `raymill data check`, or set loop.on_nan to skip or rollback."
            )


def call_hook(job: Job, state: TrainState, name: Literal["after_step", "after_epoch"], now: Now) -> None:
    """Let the task change the model, if it wants to. Each rank has its own running statistics until then."""
    if contracts.overrides(job.task, name):
        broadcast_buffers(state.model)
        seed_everything(job.spec.loop.seed, HOOK, now.position, name == "after_epoch")
        contracts.hook(job.task, name, state.model, now)


def _few(row_ids: Sequence[int]) -> str:
    """The first of these ids, and how many there are; all of them stand in the run's events."""
    if len(row_ids) <= MAX_SHOWN_ROWS:
        return str(list(row_ids))
    return f"{len(row_ids)}, the first of them {list(row_ids[:MAX_SHOWN_ROWS])}; the run's events have them all"
