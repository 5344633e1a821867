"""What each worker runs, in time order: restore, step, evaluate, checkpoint, stop. It knows no Ray: packets and reporter are
given.

The steps come from `steps.remaining_steps`, a pure function of the position; the rows from a `Feed`; what happened goes to the
reporter as events. With one rank the same code runs without a process group.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Literal, assert_never

import numpy as np
import torch

from raymill import faults
from raymill.checkpoint.commit import better
from raymill.checkpoint.snapshot import weights_sha256
from raymill.data.bad_rows import BadRow
from raymill.data.feed import Feed
from raymill.data.order import num_batches
from raymill.data.reader import Packet
from raymill.data.rows import ROW_ID
from raymill.data.seeds import COLLATE, HOOK, STEP, seed_everything
from raymill.errors import CheckpointError, NumberError, RunError
from raymill.own_code.traces import noting, row_ids
from raymill.parallel.clock import Clock, RankTime, held_up_s, share
from raymill.parallel.ddp import DistributedObjective
from raymill.parallel.gradients import Microbatch, SavedBuffers, averaged_gradients, gradient_norm, ordered_gradients
from raymill.parallel.process_group import all_gather, all_gather_integers, all_gather_lines, broadcast_buffers
from raymill.record.events import (
    EvaluationDone,
    EvaluationGoesOn,
    FirstStepDone,
    StageReached,
    StepDone,
    StepRefused,
    StragglerFound,
    TaskChanged,
)
from raymill.record.store import Report, ResumePoint
from raymill.task import TRAIN, VALIDATION, Now, Task
from raymill.training.assembly import Job, WorkerContext
from raymill.training.batch import to_device
from raymill.training.evaluation import Evaluation, evaluate_batch
from raymill.training.outcome import Outcome
from raymill.training.pending_step import PendingStep
from raymill.training.state import TrainState, broken_weights, build_state, capture, final_weights, restore
from raymill.training.steps import EpochEnd, EvalEnd, EvalStep, Step, TrainEnd, TrainStep, may_stop_after, remaining_steps
from raymill.training.stragglers import StragglerDetector
from raymill.training.task_attributes import AttributeWatch

MAX_SHOWN_ROWS = 5
"""Of a batch, in a message."""


@dataclass
class StepMetrics:
    """What one rank measures of a step.

    Attributes:
        losses: metric -> this rank's part of a sum over ranks.
        known: metric -> value that all ranks know.
    """

    losses: dict[str, float]
    known: dict[str, float]


def train(
    job: Job,
    context: WorkerContext,
    point: ResumePoint,
    packets: Iterator[Packet],
    report: Report,
    should_stop: Callable[[], bool],
) -> Outcome:
    """Train from a point on to the end, or until asked to stop.

    Args:
        job: what to do.
        context: which worker this is.
        point: where the attempt begins; the packets were opened at the same.
        packets: this rank's packets from the point's position on.
        report: takes events; only rank 0's are used.
        should_stop: whether to stop after this step; asked on rank 0 only.

    Raises:
        RunError: and its kinds, when the run cannot go on.
    """
    report(StageReached(stage="building the model"))
    state = build_state(job, context)
    if point.checkpoint is not None:
        restore(state, context.store.load(point.checkpoint))
    if state.position != point.position:
        raise CheckpointError(
            f"checkpoint {point.checkpoint} is of position {state.position}, but its stream was opened at {point.position}: a "
            "fault in raymill. Nothing was trained; please report it."
        )
    faults.here(rank=context.rank, attempt=point.attempt, step=job.order.step(state.position))
    faults.point("restored")
    report(StageReached(stage="waiting for the first rows"))
    loop = _Loop(job, context, state, point, packets, report, should_stop)
    try:
        return loop.run()
    finally:
        loop.close()


class _Loop:
    """One attempt at a job on one rank."""

    def __init__(
        self,
        job: Job,
        context: WorkerContext,
        state: TrainState,
        point: ResumePoint,
        packets: Iterator[Packet],
        report: Report,
        should_stop: Callable[[], bool],
    ) -> None:
        self.job, self.context, self.state, self.point = job, context, state, point
        self.feed = Feed(packets, _bad_row_listener(job, context, report))
        self.report, self.should_stop = report, should_stop
        self.clock = Clock()
        self.evaluation = Evaluation()
        self.checkpoint_writer = context.store.checkpoint_writer(point.attempt, job.spec.checkpoint.keep, report)
        self.last_saved = (state.position, state.evaluated)
        self.attribute_watch = AttributeWatch(job.task)
        self.stopping = False
        self.pending: PendingStep | None = None
        self.straggler_detector = StragglerDetector()

    def run(self) -> Outcome:
        """Take step after step."""
        for step in remaining_steps(self.job.order, self.point.position, evaluated=self.point.evaluated):
            self.take(step)
            if self.stopping and may_stop_after(step, self.job.order):
                self.save()
                break
        self.finish_pending_step()
        self.checkpoint_writer.wait()
        broadcast_buffers(self.state.model)
        return self.outcome()

    def take(self, step: Step) -> None:
        """Do what a step says."""
        self.feed.handed_out.clear()
        match step:
            case TrainStep():
                with noting(lambda: self.where(step)):
                    self.train_step(step)
            case TrainEnd():
                self.end_training(step)
            case EvalStep():
                with noting(lambda: self.where(step)):
                    self.eval_step(step)
            case EvalEnd():
                self.end_evaluation(step)
            case EpochEnd():
                self.end_epoch(step)
            case _:
                assert_never(step)

    def where(self, step: TrainStep | EvalStep) -> str:
        """What this rank works on, for an error's note."""
        what = f"step {self.job.order.step(step.position)}" if isinstance(step, TrainStep) else "evaluation"
        split = TRAIN if isinstance(step, TrainStep) else VALIDATION
        ids = [number for part in self.feed.handed_out for number in part.tolist()]
        rows = f", {split} rows {row_ids(ids)}" if ids else ""
        return f"rank {self.context.rank}, {what} (epoch {step.epoch}, batch {step.batch}){rows}"

    def close(self) -> None:
        """Release the thread that saves."""
        self.checkpoint_writer.close()

    # ------------------------------------------------------------ a training step

    def train_step(self, step: TrainStep) -> None:
        """Train on one global batch, or pass over it if it is one that spoiled the numbers before."""
        number = self.job.order.step(step.position)
        faults.here(step=number)
        ids: list[np.ndarray] = []
        microbatches = self.take_microbatches(step, ids)
        own = self.clock.apart(self.feed.wait_s)
        batch_rows = self.job.shardings[TRAIN].batch_size(step.batch)
        rows = self.count_good_rows(microbatches, batch_rows)
        skipped = step.position in self.point.skipped_positions or not rows
        metrics = StepMetrics({}, {})
        now = self.now(step)
        for index, objective in enumerate(self.state.objectives):
            if not skipped and objective.objective.is_due(number):
                skipped = not self.minimise(index, objective, microbatches, rows, step, ids, metrics)
            for group in self.state.optimizers[objective.name]:
                group.advance()
        if not skipped:
            self.call_hook("after_step", now)
            if self.state.average:
                self.state.average.add(number)
        self.clock.gather(self.feed.wait_s)
        self.state.position = step.position
        self.state.rows_skipped += batch_rows - (0 if skipped else rows)
        self.finish_pending_step()
        used = 0 if skipped else sum(microbatch.count for microbatch in microbatches)
        wants_stop = self.context.rank == 0 and self.should_stop()
        own = replace(own, forward_s=sum(objective.clock.take() for objective in self.state.objectives))
        event = StepDone(step=number, epoch=step.epoch, rows=step.position, metrics=metrics.known)
        training_s = None
        if self.clock.started:
            event = event.model_copy(update={"rows_per_s": self.clock.rows_per_s(step.position)})
            training_s = self.clock.training_s()
        self.pending = PendingStep(event, metrics.losses, used, own, training_s=training_s, wants_stop=wants_stop)
        if not self.clock.started:
            self.finish_first_step()
        if changed := self.attribute_watch.changed():
            self.report(TaskChanged(step=number, attributes=changed))
        faults.point("step_done")
        if number % self.job.plan.checkpoint_every_steps == 0 and may_stop_after(step, self.job.order):
            self.save()

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
                found.append(Microbatch(shard, len(ids[-1]), to_device(self.job.collate(rows), self.context.device)))
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
        metrics: StepMetrics,
    ) -> bool:
        """One optimizer step of one objective; adds to the metrics. Returns False for a step that was refused."""
        name, spec = objective.name, self.job.spec
        groups, number = self.state.optimizers[name], self.job.order.step(step.position)
        for group in groups:
            group.optimizer.zero_grad(set_to_none=True)
        self.state.restore_modes()
        saved = SavedBuffers.of(self.state.model) if spec.loop.on_nan == "skip" else None
        compute_gradients = ordered_gradients if spec.loop.strict else averaged_gradients
        with objective.in_step(self.now(step)):
            loss_sum = compute_gradients(
                objective,
                microbatches,
                rows,
                lambda shard: seed_everything(spec.loop.seed, STEP, step.position, shard, index),
            )
        faults.point("after_backward")
        for group in groups:
            group.hold_back(number)
        norm = gradient_norm(objective.parameters)
        # The one time in a step that the device is waited for.
        norm_value, loss_sum_value = torch.stack([norm.double(), loss_sum]).tolist()
        if not math.isfinite(norm_value):
            self.refuse(step, name, norm_value, ids)
            if saved is not None:
                saved.restore()
            return False
        rates = {f"learning_rate{f'_{place}' if place > 1 else ''}": group.learning_rate for place, group in enumerate(groups, 1)}
        for group in groups:
            group.step(number)
        faults.point("after_optimizer")
        metrics.losses[f"train/{_label(name, 'loss')}"] = loss_sum_value / rows
        metrics.known[f"train/{_label(name, 'gradient_norm')}"] = norm_value
        metrics.known |= {f"train/{_label(name, quantity)}": rate for quantity, rate in rates.items()}
        return True

    def now(self, step: TrainStep | TrainEnd) -> Now:
        """The moment of a step, as the job's own code is told of it."""
        order = self.job.order
        number = order.step(step.position)
        return Now(number, step.epoch, order.steps_per_epoch, self.job.plan.total_steps, step.position)

    def call_hook(self, name: Literal["after_step", "after_epoch"], now: Now) -> None:
        """Let the task change the model, if it wants to. Each rank has its own running statistics until then."""
        if getattr(type(self.job.task), name) is not getattr(Task, name):
            broadcast_buffers(self.state.model)
            seed_everything(self.job.spec.loop.seed, HOOK, now.position, name == "after_epoch")
            with torch.no_grad():
                getattr(self.job.task, name)(self.state.model, now)

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

    def finish_first_step(self) -> None:
        """Say that the first step is done, and then start the clock for speeds: who hears of it may take some time."""
        self.report(FirstStepDone(step=self.job.order.step(self.state.position)))
        self.clock.start(self.state.position, self.feed.wait_s)

    def finish_pending_step(self) -> None:
        """Wait for the sums of the step before: report it, and hear whether rank 0 wants to stop."""
        if self.pending is None:
            return
        done = self.pending.finish()
        self.state.rows_used += done.rows
        event = done.event
        if done.training_s is not None:
            self.clock.training_held_up_s += held_up_s(done.ranks)
            waited = share(self.clock.training_held_up_s, done.training_s)
            event = event.model_copy(update={"data_wait_share": waited})
        self.report(event)
        # Only rank 0's reports are used.
        if self.context.rank == 0 and (straggler := self.straggler_detector.add([rank.forward_s for rank in done.ranks])):
            self.report(StragglerFound(step=event.step, **asdict(straggler)))
        self.pending = None
        self.stopping |= done.wants_stop

    # ------------------------------------------------------------ evaluation and epochs

    def end_training(self, step: TrainEnd) -> None:
        """Close the epoch's pass; save before the evaluation, which may take longer than what was trained since the last save."""
        self.feed.finish(TRAIN, step.epoch, self.job.plan.train_windows)
        self.call_hook("after_epoch", self.now(step))
        if self.job.order.validation is not None:
            self.state.evaluated = False
            self.save()

    def eval_step(self, step: EvalStep) -> None:
        """Measure this rank's part of one batch, and give a sign of life."""
        start_s = time.perf_counter()
        if step.batch == 0:
            # Each rank has its own running statistics since the last forward pass; the model is rank 0's.
            broadcast_buffers(self.state.model)
            if self.state.average:
                self.state.average.exchange()
            self.clock.gather(self.feed.wait_s)
        faults.point("evaluation_batch")
        evaluate_batch(self.job, self.context, self.state.model, self.feed, step.epoch, step.batch, self.evaluation)
        sharding = self.job.shardings[VALIDATION]
        count = num_batches(sharding.num_rows, sharding.batch_rows)
        self.report(EvaluationGoesOn(epoch=step.epoch, batch=step.batch, num_batches=count))
        self.clock.evaluation_s += time.perf_counter() - start_s

    def end_evaluation(self, step: EvalEnd) -> None:
        """Add up all ranks and report."""
        start_s = time.perf_counter()
        self.feed.finish(VALIDATION, step.epoch, self.job.plan.validation_windows)
        if self.state.average:
            self.state.average.exchange()
        own = self.clock.apart(self.feed.wait_s)
        ranks = all_gather(torch.tensor(astuple(own), dtype=torch.float64))
        self.clock.evaluation_held_up_s += held_up_s([RankTime(*rank.tolist()) for rank in ranks])
        if self.job.spec.bad_rows.lenient:
            # A rank may have had bad rows only.
            measured = map(json.loads, all_gather_lines(json.dumps(self.evaluation.quantities())))
            self.evaluation.expect(next(filter(None, measured), {"means": [], "totals": {}}))
        values, totals, rows = self.evaluation.reduce(all_gather)
        self.evaluation = Evaluation()
        self.state.metrics = {f"{VALIDATION}/{name}": value for name, value in values.items()}
        self.finish_pending_step()
        self.report(
            EvaluationDone(
                step=self.job.order.step(step.position),
                epoch=step.epoch,
                rows=rows,
                metrics=self.state.metrics,
                totals={f"{VALIDATION}/{name}": total for name, total in totals.items()},
            )
        )
        self.clock.evaluation_s += time.perf_counter() - start_s
        self.clock.gather(self.feed.wait_s)

    def end_epoch(self, step: EpochEnd) -> None:
        """Save behind the evaluation, with what it found."""
        faults.point("epoch_end")
        self.state.evaluated = True
        self.save(epoch_ended=True)

    # ------------------------------------------------------------ saving

    def save(self, *, epoch_ended: bool = False) -> None:
        """Save the state, once per place in the run. Only rank 0 writes: DDP keeps the same state on all ranks."""
        if self.last_saved == (self.state.position, self.state.evaluated):
            return
        self.finish_pending_step()
        self.check_weights()
        self.last_saved = (self.state.position, self.state.evaluated)
        best = epoch_ended and self.is_best()
        if self.context.rank == 0:
            self.checkpoint_writer.save(capture(self.state, self.job.order.step(self.state.position)), best=best)

    def is_best(self) -> bool:
        """Whether the last evaluation is the best so far, by the job's checkpoint metric; remembers its value if it is.

        Raises:
            RunError: nobody measured that metric.
        """
        checkpoint = self.job.spec.checkpoint
        if checkpoint.metric is None:
            return False
        if checkpoint.metric not in self.state.metrics:
            raise RunError(
                f"checkpoint.metric {checkpoint.metric!r} was not measured; evaluate() gave {sorted(self.state.metrics)}. "
                "Name one of these in the job file."
            )
        value = self.state.metrics[checkpoint.metric]
        if not better(value, self.state.best, checkpoint.mode):
            return False
        self.state.best = value
        return True

    def check_weights(self) -> None:
        """Refuse to save weights that are not numbers. All ranks see the same ones."""
        if broken := broken_weights(self.state.model):
            raise NumberError(
                f"step {self.job.order.step(self.state.position)}: the weights {broken} hold NaN or infinite numbers; they were "
                "not saved. Lower optimizer.lr, or set optimizer.max_grad_norm, and resume from the last checkpoint."
            )

    def outcome(self) -> Outcome:
        """The result of this attempt."""
        speed = self.clock.rows_per_s(self.state.position) if self.clock.started else 0.0
        waited = share(self.clock.training_held_up_s, self.clock.training_s())
        return Outcome(
            status="finished" if self.state.evaluated and self.state.position == self.job.order.total_rows else "interrupted",
            step=self.job.order.step(self.state.position),
            position=self.state.position,
            rows_used=self.state.rows_used,
            rows_skipped=self.state.rows_skipped,
            metrics=dict(self.state.metrics),
            weights_sha256=weights_sha256(final_weights(self.state)),
            rows_per_s=speed,
            data_wait_share=waited,
            evaluation_wait_share=share(self.clock.evaluation_held_up_s, self.clock.evaluation_s),
        )


def _bad_row_listener(job: Job, context: WorkerContext, report: Report) -> Callable[[Sequence[BadRow]], None]:
    """Who takes note of bad rows: rank 0, where the run goes on without them."""
    spec = job.spec.bad_rows
    if context.rank > 0 or not spec.lenient:
        return lambda rows: None
    return context.store.bad_row_ledger(spec.policy, job.plan.bad_rows_budget, report)


def _few(row_ids: Sequence[int]) -> str:
    """The first of these ids, and how many there are; all of them stand in the run's events."""
    if len(row_ids) <= MAX_SHOWN_ROWS:
        return str(list(row_ids))
    return f"{len(row_ids)}, the first of them {list(row_ids[:MAX_SHOWN_ROWS])}; the run's events have them all"


def _label(objective: str, quantity: str) -> str:
    """Metric names: plain for the objective called "loss", "name_quantity" for others."""
    return quantity if objective == "loss" else f"{objective}_{quantity}"
