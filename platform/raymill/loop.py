"""What each worker runs: build, restore, step, evaluate, checkpoint, stop. It knows no Ray: packets and reporter are given.

The turns come from `order.agenda`, a pure function of the position; the rows from a `Feed`; what happened goes to the
reporter as events (see docs/architecture.md). At world size 1 the same code runs without a process group.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from raymill import faults, quick
from raymill.bad_rows import BadRow
from raymill.checkpoint import better
from raymill.collate import as_batch
from raymill.desk import Desk
from raymill.errors import NumberError, RunError
from raymill.metrics import Evaluation
from raymill.order import TRAIN, VALIDATION, Cut, JobOrder, Turn, agenda
from raymill.pace import Pace
from raymill.parallel import Wrapped, autocast, gather, gather_numbers, gather_texts, gradient_norm, move, share_buffers
from raymill.plan import Plan
from raymill.rows import ROW_ID, num_rows
from raymill.spec import JobSpec
from raymill.state import (
    EVALUATION,
    FIRST_WEIGHTS,
    STEP,
    Snapshot,
    TrainState,
    capture,
    make_optimizer,
    make_schedule,
    optimizer_spec,
    restore,
    seed_everything,
    weights_sha256,
)
from raymill.step import Exchange, Piece, Saved, apply, averaged_gradients, ordered_gradients
from raymill.stream import Feed, Packet
from raymill.task import Batch, Rows, Task

Report = Callable[[dict[str, Any]], None]

REPORT_INTERVAL_S = 0.25
"""Seconds between step events that carry speeds; every step's loss is reported all the same."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a worker sits.

    Attributes:
        rank: 0..world_size-1.
        world_size: ranks.
        device: where the model lives.
        desk: the run's folder, for checkpoints, bad rows and the record of the order.
        attempt: how often the run was started.
    """

    rank: int
    world_size: int
    device: torch.device
    desk: Desk
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is to do.

    Attributes:
        spec: the resolved job.
        plan: every derived number.
        order: the order of samples.
        cuts: split -> how batches are dealt out.
        task: the user's Task.
        collate: rows -> batch.
        passed_over: positions behind the batches that are not trained on, because they spoiled the numbers before.
    """

    spec: JobSpec
    plan: Plan
    order: JobOrder
    cuts: Mapping[str, Cut]
    task: Task
    collate: Callable[[Rows], Batch] = as_batch
    passed_over: frozenset[int] = frozenset()


@dataclass
class Clock:
    """Where the time goes, in seconds, since the first step was done."""

    started_s: float = field(default_factory=time.perf_counter)
    first_step_s: float | None = None
    rows_before: int = 0
    wait_before_s: float = 0.0
    evaluation_s: float = 0.0


def build(job: Job, seat: Seat) -> TrainState:
    """The state before the first step: the same weights on every rank, from the seed alone."""
    torch.set_num_threads(job.plan.threads)
    seed_everything(job.spec.loop.seed, FIRST_WEIGHTS)
    model = job.task.build().to(seat.device)
    objectives = list(job.task.objectives())
    names = [objective.name for objective in objectives]
    loop = job.spec.loop
    wrapped = [Wrapped(model, objective, loop.precision, seat.device, strict=loop.strict) for objective in objectives]
    optimizers = {w.objective.name: make_optimizer(optimizer_spec(job.spec, w.objective.name, names), w) for w in wrapped}
    schedules = {}
    for name, optimizer in optimizers.items():
        schedule = make_schedule(job.spec, optimizer, job.plan.total_steps)
        if schedule is not None:
            schedules[name] = schedule
    return TrainState(model, wrapped, optimizers, schedules)


def train(
    job: Job,
    seat: Seat,
    snapshot: Snapshot | None,
    packets: Iterator[Packet],
    report: Report,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Train from the snapshot (or the beginning) to the end, or until asked to stop.

    Args:
        job: what to do.
        seat: who this is.
        snapshot: the state to go on from, the same on every rank.
        packets: this rank's packets from the snapshot's position on.
        report: takes events; only rank 0's are used.
        should_stop: whether to stop after this step; asked on rank 0 only.

    Returns:
        The outcome as JSON-ready values, the same on every rank but for times.

    Raises:
        RunError: and its kinds, when the run cannot go on.
    """
    state = build(job, seat)
    if snapshot is not None:
        restore(state, snapshot)
    faults.here(rank=seat.rank, attempt=seat.attempt, step=job.order.step(state.position))
    faults.point("restored")
    loop = _Loop(job, seat, state, packets, report, should_stop)
    try:
        return loop.run()
    finally:
        loop.close()


def measure(job: Job, seat: Seat, model: nn.Module, feed: Feed, epoch: int, number: int, evaluation: Evaluation) -> None:
    """Add a rank's part of validation batch `number` to an evaluation.

    What comes out depends on the weights and the data alone, so that `raymill.evaluation` finds the run's own numbers.
    """
    model.eval()
    with torch.no_grad(), autocast(job.spec.loop.precision, seat.device):
        for shard, count in job.cuts[VALIDATION].shards(number, seat.rank):
            rows = feed.take(VALIDATION, epoch, count)
            if present := num_rows(rows):
                seed_everything(job.spec.loop.seed, EVALUATION, number, shard)
                batch = move(job.collate(rows), seat.device)
                evaluation.add(job.task.evaluate(model, batch), present)


class _Loop:
    """One attempt at a job on one rank."""

    def __init__(
        self,
        job: Job,
        seat: Seat,
        state: TrainState,
        packets: Iterator[Packet],
        report: Report,
        should_stop: Callable[[], bool],
    ) -> None:
        self.job, self.seat, self.state = job, seat, state
        self.feed = Feed(packets, _listing(job, seat, report))
        self.report, self.should_stop = report, should_stop
        self.clock = Clock(rows_before=state.position)
        self.evaluation = Evaluation()
        self.keeper = seat.desk.keeper(seat.attempt, job.spec.checkpoint.keep, report)
        self.last_saved = state.position
        self.settled = False
        self.stopping = False
        self.exchange: Exchange | None = None
        self.pace = Pace()

    def run(self) -> dict[str, Any]:
        """Take turn after turn."""
        for turn in agenda(self.job.order, self.state.position):
            if turn.split == TRAIN and turn.batch is not None:
                self.step(turn, turn.batch)
            elif turn.split == TRAIN:
                self.end_epoch(turn)
            elif turn.batch is not None:
                self.evaluate(turn, turn.batch)
            else:
                self.end_evaluation(turn)
            if self.stopping and self.is_rest(turn):
                self.save()
                break
        self.settle_exchange()
        self.keeper.wait()
        share_buffers(self.state.model)
        return self.outcome("finished" if self.state.position == self.job.order.total_rows else "interrupted")

    def is_rest(self, turn: Turn) -> bool:
        """Whether the position stands for all that was done: behind a step, or at an epoch's end behind its evaluation."""
        epoch_ended = turn.position % self.job.order.train.num_rows == 0
        return turn.split == TRAIN and (turn.batch is None) == epoch_ended

    def close(self) -> None:
        """Release the thread that saves."""
        self.keeper.close()

    # ------------------------------------------------------------ a step

    def step(self, turn: Turn, number: int) -> None:
        """Train on one global batch, or pass over it if it is one that spoiled the numbers before."""
        faults.here(step=self.job.order.step(turn.position))
        ids: list[np.ndarray] = []
        pieces = self.pieces(turn, number, ids)
        places = self.job.cuts[TRAIN].batch_size(number)
        rows = self.good_rows(pieces, places)
        if rows:
            self.settle(pieces)
        skipped = turn.position in self.job.passed_over or not rows
        measured: dict[str, float] = {}
        for place, wrapped in enumerate(self.state.wrapped):
            if not skipped:
                values = self.minimise(place, wrapped, pieces, rows, turn, ids)
                skipped = values is None
                measured |= values or {}
            if wrapped.objective.name in self.state.schedules:
                self.state.schedules[wrapped.objective.name].step()
        self.state.position = turn.position
        self.state.rows_skipped += places - (0 if skipped else rows)
        step = self.job.order.step(turn.position)
        self.settle_exchange()
        used = 0 if skipped else sum(piece.count for piece in pieces)
        wants_stop = self.seat.rank == 0 and self.should_stop()
        forward_s = sum(wrapped.take_forward_s() for wrapped in self.state.wrapped)
        self.exchange = Exchange(self.event(step, turn, measured), used, forward_s, wants_stop=wants_stop)
        if self.clock.first_step_s is None:
            self.first_step()
        faults.point("step_done")
        if step % self.job.plan.checkpoint_every_steps == 0 and self.is_rest(turn):
            self.save()

    def settle(self, pieces: list[Piece]) -> None:
        """Before an attempt's first step: let DDP fix what it otherwise fixes during that step."""
        if not self.settled:
            batch = pieces[0].batch if pieces else None
            if batch is None and self.seat.rank == 0:
                # Rank 0 decides the order of DDP's buckets, and a pass over no rows would decide otherwise.
                rows = self.feed.peek(TRAIN, self.job.plan.global_batch_rows // self.job.cuts[TRAIN].num_shards)
                batch = move(self.job.collate(rows), self.seat.device) if rows else None
            for wrapped in self.state.wrapped:
                wrapped.settle(batch)
            self.settled = True

    def pieces(self, turn: Turn, number: int, ids: list[np.ndarray]) -> list[Piece]:
        """The next training rows of this rank by shard, on its device; their row ids are added to `ids`."""
        found = []
        for shard, count in self.job.cuts[TRAIN].shards(number, self.seat.rank):
            rows = self.feed.take(TRAIN, turn.epoch, count)
            ids.append(np.asarray(rows[ROW_ID]))
            if self.job.spec.loop.record_order and count:
                record = {"attempt": self.seat.attempt, "position": turn.position, "rows": ids[-1].tolist()}
                self.seat.desk.note_order(record)
            if len(ids[-1]):
                found.append(Piece(shard, len(ids[-1]), move(self.job.collate(rows), self.seat.device)))
        return found

    def good_rows(self, pieces: list[Piece], places: int) -> int:
        """The rows in these places of a global batch, of all ranks: all of them, unless bad ones may be left out."""
        if not self.job.spec.bad_rows.lenient:
            return places
        return sum(int(count) for count in gather(torch.tensor(sum(piece.count for piece in pieces))))

    def minimise(
        self, place: int, wrapped: Wrapped, pieces: list[Piece], rows: int, turn: Turn, ids: list[np.ndarray]
    ) -> dict[str, float] | None:
        """One optimizer step of one objective; returns this rank's part of the metrics, or None for a refused step."""
        name, spec = wrapped.objective.name, self.job.spec
        optimizer = self.state.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        self.state.model.train()
        saved = Saved.of(self.state.model) if spec.loop.on_nan == "skip" else None
        gradients = ordered_gradients if spec.loop.strict else averaged_gradients
        with wrapped.only_own():
            loss_sum = gradients(
                wrapped, pieces, rows, lambda shard: seed_everything(spec.loop.seed, STEP, turn.position, shard, place)
            )
        faults.point("after_backward")
        norm = gradient_norm(wrapped.parameters)
        if not bool(torch.isfinite(norm)):
            self.refuse(turn, name, float(norm), ids)
            if saved is not None:
                saved.restore()
            return None
        clip_norm = optimizer_spec(spec, name, [w.objective.name for w in self.state.wrapped]).clip_norm
        rate = optimizer.param_groups[0]["lr"]
        apply(wrapped, optimizer, norm, clip_norm)
        faults.point("after_optimizer")
        return {
            f"train/{_label(name, 'loss')}": loss_sum / rows,
            f"train/{_label(name, 'gradient_norm')}": float(norm),
            f"train/{_label(name, 'learning_rate')}": float(rate),
        }

    def refuse(self, turn: Turn, name: str, norm: float, ids: list[np.ndarray]) -> None:
        """Do not take a step whose gradient is not a number; the weights are as before. All ranks see the same norm.

        Raises:
            NumberError: unless the policy is to skip the batch.
        """
        step, policy = self.job.order.step(turn.position), self.job.spec.loop.on_nan
        row_ids = gather_numbers(np.concatenate(ids) if ids else np.zeros(0, np.int64))
        self.report(
            {"kind": "refused", "step": step, "epoch": turn.epoch, "position": turn.position, "rows": row_ids, "policy": policy}
        )
        if policy != "skip":
            raise NumberError(
                f"step {step} (epoch {turn.epoch}, batch {turn.batch}): the gradient of objective {name!r} has norm {norm}. "
                f"Its step was not taken. Rows of the batch: {row_ids}. Lower optimizer.lr, set optimizer.clip_norm, "
                "look for NaN in the rows with `raymill data check`, or set loop.on_nan to skip or rollback."
            )

    def event(self, step: int, turn: Turn, measured: dict[str, float]) -> dict[str, Any]:
        """A step event without what other ranks still have to add."""
        now = time.perf_counter()
        event: dict[str, Any] = {
            "kind": "step",
            "step": step,
            "epoch": turn.epoch,
            "rows": turn.position,
            "metrics": measured,
        }
        if self.clock.first_step_s is not None:
            elapsed = now - self.clock.first_step_s - self.clock.evaluation_s
            event["rows_per_s"] = (turn.position - self.clock.rows_before) / max(elapsed, 1e-9)
            event["data_wait_share"] = min(1.0, (self.feed.wait_s - self.clock.wait_before_s) / max(elapsed, 1e-9))
        return event

    def first_step(self) -> None:
        """Start the clock for speeds behind the first step, and say that it is done."""
        quick.settle()
        self.clock.first_step_s = time.perf_counter()
        self.clock.rows_before = self.state.position
        self.clock.wait_before_s = self.feed.wait_s
        self.report({"kind": "first_step", "step": self.job.order.step(self.state.position)})

    def settle_exchange(self) -> None:
        """Finish the exchange of the step before: report it, and hear whether rank 0 wants to stop."""
        if self.exchange is None:
            return
        done = self.exchange.finish()
        self.state.rows_used += done.rows
        self.report(done.event)
        # Only rank 0's reports are used.
        if self.seat.rank == 0 and (slow := self.pace.add(done.forward_s)):
            self.report({"kind": "slow_rank", "step": done.event["step"], **asdict(slow)})
        self.exchange = None
        self.stopping |= done.wants_stop

    # ------------------------------------------------------------ evaluation and epochs

    def evaluate(self, turn: Turn, number: int) -> None:
        """Measure this rank's part of one batch."""
        start = time.perf_counter()
        if number == 0:
            # Each rank has its own running statistics since the last forward pass; the model is rank 0's.
            share_buffers(self.state.model)
        faults.point("evaluation_batch")
        measure(self.job, self.seat, self.state.model, self.feed, turn.epoch, number, self.evaluation)
        self.clock.evaluation_s += time.perf_counter() - start

    def end_evaluation(self, turn: Turn) -> None:
        """Add up all ranks and report."""
        self.feed.finish(VALIDATION, turn.epoch, self.job.plan.validation_windows)
        if self.job.spec.bad_rows.lenient:
            # A rank may have had bad rows only.
            measured = map(json.loads, gather_texts(json.dumps(self.evaluation.quantities())))
            self.evaluation.expect(next(filter(None, measured), {"means": [], "totals": {}}))
        values, totals, rows = self.evaluation.reduce(gather)
        self.evaluation = Evaluation()
        self.state.metrics = {f"{VALIDATION}/{name}": value for name, value in values.items()}
        self.settle_exchange()
        self.report(
            {
                "kind": "evaluation",
                "step": self.job.order.step(turn.position),
                "epoch": turn.epoch,
                "rows": rows,
                "metrics": self.state.metrics,
                "totals": {f"{VALIDATION}/{name}": total for name, total in totals.items()},
            }
        )

    def end_epoch(self, turn: Turn) -> None:
        """Close the epoch's pass and save."""
        self.feed.finish(TRAIN, turn.epoch, self.job.plan.train_windows)
        faults.point("epoch_end")
        self.save(epoch_ended=True)

    # ------------------------------------------------------------ saving

    def save(self, *, epoch_ended: bool = False) -> None:
        """Save the state, once per position. Only rank 0 writes: DDP keeps the same state on all ranks."""
        if self.last_saved == self.state.position:
            return
        self.settle_exchange()
        self.check_weights()
        self.last_saved = self.state.position
        checkpoint = self.job.spec.checkpoint
        best = False
        if epoch_ended and checkpoint.metric is not None:
            if checkpoint.metric not in self.state.metrics:
                raise RunError(
                    f"checkpoint.metric {checkpoint.metric!r} was not measured; evaluate() gave {sorted(self.state.metrics)}. "
                    "Name one of these in the job file."
                )
            value = self.state.metrics[checkpoint.metric]
            best = better(value, self.state.best, checkpoint.mode)
            if best:
                self.state.best = value
        if self.seat.rank == 0:
            self.keeper.save(capture(self.state, self.job.order.step(self.state.position)), best=best)

    def check_weights(self) -> None:
        """Refuse to save weights that are not numbers. All ranks see the same ones."""
        broken = [name for name, tensor in self.state.model.named_parameters() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise NumberError(
                f"step {self.job.order.step(self.state.position)}: the weights {broken} hold NaN or infinite numbers; they were "
                "not saved. Lower optimizer.lr, or set optimizer.clip_norm, and resume from the last checkpoint."
            )

    def outcome(self, status: str) -> dict[str, Any]:
        """The result of this attempt."""
        elapsed = time.perf_counter() - (self.clock.first_step_s or time.perf_counter()) - self.clock.evaluation_s
        trained = self.state.position - self.clock.rows_before
        return {
            "status": status,
            "step": self.job.order.step(self.state.position),
            "position": self.state.position,
            "rows_used": self.state.rows_used,
            "rows_skipped": self.state.rows_skipped,
            "metrics": dict(self.state.metrics),
            "weights_sha256": weights_sha256(self.state.model.state_dict()),
            "rows_per_s": trained / elapsed if elapsed > 0 and trained else 0.0,
            "data_wait_share": (self.feed.wait_s - self.clock.wait_before_s) / elapsed if elapsed > 0 else 0.0,
        }


def _listing(job: Job, seat: Seat, report: Report) -> Callable[[Sequence[BadRow]], None]:
    """Who takes note of bad rows: rank 0, where the run goes on without them."""
    spec = job.spec.bad_rows
    if seat.rank > 0 or not spec.lenient:
        return lambda rows: None
    return seat.desk.ledger(spec.policy, job.plan.bad_rows_budget, report)


def _label(objective: str, quantity: str) -> str:
    """Metric names: plain for the objective called "loss", "name_quantity" for others."""
    return quantity if objective == "loss" else f"{objective}_{quantity}"
