"""The validation rows measured on one rank, batch by batch; then all ranks together."""

from __future__ import annotations

import json
import re
import time
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import nn

from raymill import faults
from raymill.data.feed import Feed
from raymill.data.order import num_batches
from raymill.data.rows import ROW_ID, num_rows
from raymill.data.seeds import CONCLUDE, EVALUATION, EVALUATION_COLLATE, PICTURES, seed_everything
from raymill.evaluation.kept import gathered
from raymill.evaluation.pictures import as_png
from raymill.evaluation.sums import Evaluation, as_numbers
from raymill.own_code import contracts, seams
from raymill.parallel.buffers import SavedBuffers
from raymill.parallel.clock import Clock, RankTime, held_up_s
from raymill.parallel.precision import autocast
from raymill.parallel.process_group import all_gather, all_gather_lines, alone, rank_and_world_size
from raymill.record.events import EvaluationDone, EvaluationGoesOn
from raymill.record.store import Report
from raymill.task import Picture
from raymill.training.assembly import Job, WorkerContext
from raymill.training.batch import to_device
from raymill.training.state import TrainState
from raymill.training.steps import EvalEnd, EvalStep, moment

_PLAIN = re.compile(r"[^A-Za-z0-9._-]")


class EvaluationPass:
    """The evaluations of a run, one after the other, on one rank: takes its rows from the feed."""

    def __init__(self, job: Job, context: WorkerContext, state: TrainState, feed: Feed, clock: Clock, report: Report) -> None:
        self.job, self.context, self.state = job, context, state
        self.feed, self.clock, self.report = feed, clock, report
        self.evaluation = Evaluation()
        self.buffers = SavedBuffers([])

    def measure(self, step: EvalStep) -> None:
        """Measure this rank's part of one batch, and give a sign of life."""
        start_s = time.perf_counter()
        if step.batch == 0:
            # Each rank has its own running statistics since the last forward pass; the model is rank 0's.
            self.buffers = SavedBuffers.of_rank_zero(self.state.model)
            if self.state.average:
                self.state.average.exchange()
            self.clock.gather(self.feed.wait_s)
        faults.point("evaluation_batch")
        behind = self.job.order.step(step.position)
        evaluate_batch(self.job, self.context, self.state.model, self.feed, step.split, behind, step.batch, self.evaluation)
        sharding = self.job.shardings[step.split]
        count = num_batches(sharding.num_rows, sharding.batch_rows)
        self.report(EvaluationGoesOn(split=step.split, epoch=step.epoch, batch=step.batch, num_batches=count))
        self.clock.evaluation_s += time.perf_counter() - start_s

    def finish(self, step: EvalEnd) -> EvaluationDone:
        """Bring all ranks together; what was measured is the state's from now on."""
        start_s, number = time.perf_counter(), self.job.order.step(step.position)
        self.feed.finish(step.split, number, self.job.order.evaluation(step.split).num_windows)
        own = self.clock.apart(self.feed.wait_s)
        ranks = all_gather(torch.tensor(astuple(own), dtype=torch.float64))
        self.clock.evaluation_held_up_s += held_up_s([RankTime(*rank.tolist()) for rank in ranks])
        found = concluded(self.job, self.evaluation)
        self.evaluation = Evaluation()
        pictures = found.pictures | self.pictures_of_model(step)
        if self.state.average:
            self.state.average.exchange()
        # An evaluation leaves no trace: an observer goes on observing in eval mode, and each rank has other rows there.
        self.buffers.restore()
        metrics = {f"{step.split}/{name}": value for name, value in found.metrics.items()}
        others = {name: value for name, value in self.state.metrics.items() if not name.startswith(f"{step.split}/")}
        self.state.metrics = others | metrics
        self.clock.evaluation_s += time.perf_counter() - start_s
        self.clock.gather(self.feed.wait_s)
        return EvaluationDone(
            split=step.split,
            step=number,
            epoch=step.epoch,
            rows=found.num_rows,
            metrics=metrics,
            totals={f"{step.split}/{name}": as_numbers(total) for name, total in found.totals.items()},
            pictures={name: self.keep(f"{step.split}-{name}-{number:08}.png", one) for name, one in pictures.items()},
        )

    def pictures_of_model(self, step: EvalEnd) -> dict[str, Picture]:
        """What the task draws of its model, on rank 0."""
        task, model, seed = self.job.task, self.state.model, self.job.spec.loop.seed
        if self.context.rank or not contracts.overrides(task, "pictures"):
            return {}
        model.eval()
        seed_everything(seed, PICTURES)
        with torch.no_grad(), alone(), autocast(self.job.spec.loop.precision, self.context.device):
            return contracts.pictures(task, model, moment(self.job.order, step))

    def keep(self, name: str, picture: Picture) -> str:
        """Keep a picture with the run; returns its place in the run's folder."""
        try:
            return self.context.store.keep_picture(_PLAIN.sub("_", name), as_png(picture))
        except (TypeError, ValueError) as error:
            raise seams.wrong(seams.PICTURES, self.job.task.pictures, f"{name!r}: {error}") from error


@dataclass(frozen=True)
class Concluded:
    """What an evaluation came to; the same on all ranks but for pictures, which rank 0 alone has.

    Attributes:
        metrics: name -> number.
        totals: name -> sum over all rows.
        pictures: name -> picture.
        num_rows: rows measured.
    """

    metrics: dict[str, float]
    totals: dict[str, torch.Tensor]
    pictures: dict[str, Picture]
    num_rows: int


def concluded(job: Job, evaluation: Evaluation) -> Concluded:
    """Bring what all ranks have measured together, and let the task conclude from it, on rank 0.

    Raises:
        InputError: the task's conclusions are none, or have the name of a mean.
    """
    if job.spec.bad_rows.lenient:
        # A rank may have had bad rows only.
        measured = map(json.loads, all_gather_lines(json.dumps(evaluation.quantities())))
        evaluation.expect(next(filter(None, measured), {"means": [], "totals": {}}))
    means, totals, num_rows = evaluation.reduce(all_gather)
    numbers: dict[str, float] = {}
    pictures: dict[str, Picture] = {}
    if contracts.overrides(job.task, "conclude"):
        kept = gathered(evaluation.kept)
        rank, _ = rank_and_world_size()
        if rank == 0:
            seed_everything(job.spec.loop.seed, CONCLUDE)
            with torch.no_grad(), alone():
                found = contracts.conclude(job.task, kept, totals)
            if twice := sorted(found.keys() & means.keys()):
                raise seams.wrong(
                    seams.CONCLUDE, job.task.conclude, f"{twice}, which evaluate() gives too", "Give them other names."
                )
            pictures = {name: value for name, value in found.items() if isinstance(value, Picture)}
            numbers = {name: value for name, value in found.items() if not isinstance(value, Picture)}
        numbers = json.loads(all_gather_lines(json.dumps(numbers))[0])
    return Concluded(means | numbers, totals, pictures, num_rows)


def evaluate_batch(
    job: Job, context: WorkerContext, model: nn.Module, feed: Feed, split: str, step: int, number: int, evaluation: Evaluation
) -> None:
    """Add a rank's part of batch `number` of a split to an evaluation behind a step.

    What comes out depends on the weights and the data alone, so that `raymill evaluate` finds the run's own numbers.
    """
    model.eval()
    with torch.no_grad(), autocast(job.spec.loop.precision, context.device):
        for shard, count in job.shardings[split].shards(number, context.rank):
            rows = feed.take(split, step, count)
            if present := num_rows(rows):
                seed_everything(job.spec.loop.seed, EVALUATION_COLLATE, number, shard)
                batch = to_device(job.collate(rows), context.device)
                seed_everything(job.spec.loop.seed, EVALUATION, number, shard)
                evaluation.add(contracts.evaluate(job.task, model, batch, present), np.asarray(rows[ROW_ID]))
