"""What each worker runs, in time order: restore, step, evaluate, checkpoint, stop. It knows no Ray: packets and reporter are
given.

The steps come from `steps.remaining_steps`, a pure function of the position; the rows from a `Feed`; what happened goes to the
reporter as events. With one rank the same code runs without a process group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import assert_never

from raymill import faults
from raymill.checkpoint.commit import better
from raymill.checkpoint.snapshot import weights_sha256
from raymill.data.bad_rows import BadRow
from raymill.data.feed import Feed
from raymill.data.reader import Packet, read_locally
from raymill.errors import CheckpointError, NumberError, RunError
from raymill.own_code.traces import noting, row_ids
from raymill.parallel.clock import Clock, held_up_s, share
from raymill.parallel.process_group import broadcast_buffers
from raymill.record.events import (
    FirstStepDone,
    StageReached,
    StepDone,
    StragglerFound,
    TaskChanged,
    TrainingEnded,
)
from raymill.record.store import Report, ResumePoint
from raymill.task import TRAIN
from raymill.training.assembly import Job, WorkerContext
from raymill.training.early_stopping import end_reason
from raymill.training.evaluation_pass import EvaluationPass
from raymill.training.outcome import Outcome
from raymill.training.pending_step import PendingStep
from raymill.training.state import TrainState, broken_weights, build_state, capture, final_weights, restore
from raymill.training.steps import EvalEnd, EvalStep, SaveStep, Step, TrainEnd, TrainStep, may_stop_after, moment, remaining_steps
from raymill.training.stragglers import StragglerDetector
from raymill.training.task_attributes import AttributeWatch
from raymill.training.train_step import StepTaker, call_hook


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
        done = job.order.step(point.position), point.position // job.order.train.num_rows
        restore(state, context.store.load(point.checkpoint), *done)
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
        self.step_taker = StepTaker(job, context, state, point, self.feed, self.clock, report)
        self.evaluation = EvaluationPass(job, context, state, self.feed, self.clock, report)
        self.checkpoint_writer = context.store.checkpoint_writer(point.attempt, job.spec.checkpoint.keep, report)
        self.last_saved = (state.position, state.evaluated, state.ended)
        self.measured: dict[str, float] = {}
        self.began_s, self.worked_before_s = time.perf_counter(), state.worked_s
        self.out_of_time = False
        self.attribute_watch = AttributeWatch(job.task)
        self.stopping = False
        self.pending: PendingStep | None = None
        self.straggler_detector = StragglerDetector()

    def run(self) -> Outcome:
        """Take step after step."""
        steps = remaining_steps(self.job.order, self.point.position, evaluated=self.point.evaluated)
        while (step := next(steps, None)) is not None:
            self.take(step)
            if not may_stop_after(step, self.job.order):
                continue
            if not self.state.ended and (reason := self.end_reason(step)):
                steps = self.end_early(step, reason)
            if self.stopping:
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
                    self.evaluation.measure(step)
            case EvalEnd():
                done = self.evaluation.finish(step)
                self.measured |= done.metrics
                self.finish_pending_step()
                self.report(done)
            case SaveStep():
                self.save_step(step)
            case _:
                assert_never(step)

    def where(self, step: TrainStep | EvalStep) -> str:
        """What this rank works on, for an error's note."""
        what = f"step {self.job.order.step(step.position)}" if isinstance(step, TrainStep) else "evaluation"
        split = TRAIN if isinstance(step, TrainStep) else step.split
        ids = [number for part in self.feed.handed_out for number in part.tolist()]
        rows = f", {split} rows {row_ids(ids)}" if ids else ""
        return f"rank {self.context.rank}, {what} (epoch {step.epoch}, batch {step.batch}){rows}"

    def close(self) -> None:
        """Release the thread that saves."""
        self.checkpoint_writer.close()

    # ------------------------------------------------------------ a training step

    def train_step(self, step: TrainStep) -> None:
        """Take a step, and send what this rank has to say of it; save where a save is due."""
        number = self.job.order.step(step.position)
        faults.here(step=number)
        taken = self.step_taker.take(step)
        self.finish_pending_step()
        hours = self.job.spec.loop.max_hours
        wants_stop = self.context.rank == 0 and self.should_stop()
        out_of_time = self.context.rank == 0 and hours is not None and self.worked_s() > hours * 3600
        event = StepDone(step=number, epoch=step.epoch, rows=step.position, metrics=taken.metrics)
        training_s = None
        if self.clock.started:
            event = event.model_copy(update={"rows_per_s": self.clock.rows_per_s(step.position)})
            training_s = self.clock.training_s()
        self.pending = PendingStep(
            event,
            taken.losses,
            taken.rows,
            taken.time,
            training_s=training_s,
            wants_stop=wants_stop,
            out_of_time=out_of_time,
        )
        if not self.clock.started:
            self.finish_first_step()
        if changed := self.attribute_watch.changed():
            self.report(TaskChanged(step=number, attributes=changed))
        faults.point("step_done")
        if number % self.job.plan.checkpoint_every_steps == 0 and may_stop_after(step, self.job.order):
            self.save()

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
        self.out_of_time |= done.out_of_time

    # ------------------------------------------------------------ evaluation and epochs

    def end_training(self, step: TrainEnd) -> None:
        """Close the epoch's pass, and let the task change the model behind it."""
        self.feed.finish(TRAIN, step.epoch, self.job.order.train.num_windows)
        call_hook(self.job, self.state, "after_epoch", moment(self.job.order, step))

    def save_step(self, step: SaveStep) -> None:
        """Save before evaluations, which may take longer than what was trained since the last save, and behind them."""
        if step.evaluated:
            faults.point("epoch_end")
            for group in (group for groups in self.state.optimizers.values() for group in groups):
                group.schedule.take_in(self.measured)
            if self.job.spec.loop.early_stopping:
                self.state.patience = self.state.patience.after(self.measured, self.job.spec.loop.early_stopping)
        self.state.evaluated = step.evaluated
        # Where the training ends, it is saved with that.
        if not (step.evaluated and self.end_reason(step)):
            self.save()

    def end_reason(self, step: Step) -> str | None:
        """Why the training ends behind this step, and not behind the job's last. All ranks know the same."""
        spec = self.job.spec.loop
        if not self.state.evaluated or self.state.position == self.job.order.total_rows:
            return None
        stopping = spec.early_stopping if isinstance(step, SaveStep) else None
        if stopping and (reason := end_reason(self.state.patience, stopping)):
            return reason
        return f"the {spec.max_hours:g} hours of loop.max_hours are over" if self.out_of_time else None

    def end_early(self, step: Step, reason: str) -> Iterator[Step]:
        """End the training here; returns what is still to do: evaluations of the training's end that were not just made.

        The stream goes on with training rows, so each rank reads the rows of these evaluations for itself.
        """
        position, number = self.state.position, self.job.order.step(self.state.position)
        made = self.job.order.due(number) if isinstance(step, SaveStep) else []
        order = self.job.order.ending_at(position)
        order = replace(order, evaluations=tuple(one for one in order.due(number) if one not in made))
        self.state.ended, self.state.evaluated = reason, not order.evaluations
        self.save()
        self.report(TrainingEnded(step=number, reason=reason))
        self.job = replace(self.job, order=order)
        reader = self.job.reader(f"{self.point.attempt} ended")
        self.feed = Feed(read_locally(reader, position, self.context.rank, evaluated=False), self.feed.note)
        self.evaluation = EvaluationPass(self.job, self.context, self.state, self.feed, self.clock, self.report)
        return remaining_steps(order, position, evaluated=not order.evaluations)

    # ------------------------------------------------------------ saving

    def save(self) -> None:
        """Save the state, once per place in the run. All ranks take part, rank 0 writes."""
        place = (self.state.position, self.state.evaluated, self.state.ended)
        if self.last_saved == place:
            return
        self.finish_pending_step()
        self.check_weights()
        self.last_saved = place
        best = self.is_best()
        self.measured.clear()
        if self.job.spec.loop.max_hours is not None:
            # Nothing else in a checkpoint differs between two runs of one job.
            self.state.worked_s = self.worked_s()
        writes = self.context.rank == 0
        taken = capture(self.state, self.job.order.step(self.state.position), keep=writes)
        if writes:
            self.checkpoint_writer.save(taken, best=best)

    def worked_s(self) -> float:
        """Seconds of work so far, all attempts together."""
        return self.worked_before_s + time.perf_counter() - self.began_s

    def is_best(self) -> bool:
        """Whether what was just measured is the best so far, by the job's checkpoint metric; remembers its value if it is.

        Raises:
            RunError: nobody measured that metric.
        """
        metric, mode = self.job.spec.checkpoint.metric, self.job.spec.checkpoint.mode
        if metric is None or not any(name.partition("/")[0] == metric.partition("/")[0] for name in self.measured):
            return False
        if metric not in self.measured:
            raise RunError(
                f"checkpoint.metric {metric!r} was not measured; evaluate() gave {sorted(self.measured)}. "
                "Name one of these in the job file."
            )
        if not better(self.measured[metric], self.state.best, mode):
            return False
        self.state.best = self.measured[metric]
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
            ended=self.state.ended,
        )


def _bad_row_listener(job: Job, context: WorkerContext, report: Report) -> Callable[[Sequence[BadRow]], None]:
    """Who takes note of bad rows: rank 0, where the run goes on without them."""
    spec = job.spec.bad_rows
    if context.rank > 0 or not spec.lenient:
        return lambda rows: None
    return context.store.bad_row_ledger(spec.policy, job.plan.bad_rows_budget, report)
