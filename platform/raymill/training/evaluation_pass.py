"""The validation rows measured on one rank, batch by batch; then all ranks together."""

from __future__ import annotations

import json
import time
from dataclasses import astuple

import torch
from torch import nn

from raymill import faults
from raymill.data.feed import Feed
from raymill.data.order import num_batches
from raymill.data.rows import num_rows
from raymill.data.seeds import EVALUATION, EVALUATION_COLLATE, seed_everything
from raymill.evaluation.sums import Evaluation
from raymill.own_code import contracts
from raymill.parallel.clock import Clock, RankTime, held_up_s
from raymill.parallel.precision import autocast
from raymill.parallel.process_group import all_gather, all_gather_lines, broadcast_buffers
from raymill.record.events import EvaluationDone, EvaluationGoesOn
from raymill.record.store import Report
from raymill.task import VALIDATION
from raymill.training.assembly import Job, WorkerContext
from raymill.training.batch import to_device
from raymill.training.state import TrainState
from raymill.training.steps import EvalEnd, EvalStep


class EvaluationPass:
    """The evaluations of a run, one after the other, on one rank: takes its rows from the feed."""

    def __init__(self, job: Job, context: WorkerContext, state: TrainState, feed: Feed, clock: Clock, report: Report) -> None:
        self.job, self.context, self.state = job, context, state
        self.feed, self.clock, self.report = feed, clock, report
        self.evaluation = Evaluation()

    def measure(self, step: EvalStep) -> None:
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

    def finish(self, step: EvalEnd) -> EvaluationDone:
        """Add up all ranks; what was measured is the state's from now on."""
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
        self.clock.evaluation_s += time.perf_counter() - start_s
        self.clock.gather(self.feed.wait_s)
        return EvaluationDone(
            step=self.job.order.step(step.position),
            epoch=step.epoch,
            rows=rows,
            metrics=self.state.metrics,
            totals={f"{VALIDATION}/{name}": total for name, total in totals.items()},
        )


def evaluate_batch(
    job: Job, context: WorkerContext, model: nn.Module, feed: Feed, epoch: int, number: int, evaluation: Evaluation
) -> None:
    """Add a rank's part of validation batch `number` to an evaluation.

    What comes out depends on the weights and the data alone, so that `raymill evaluate` finds the run's own numbers.
    """
    model.eval()
    with torch.no_grad(), autocast(job.spec.loop.precision, context.device):
        for shard, count in job.shardings[VALIDATION].shards(number, context.rank):
            rows = feed.take(VALIDATION, epoch, count)
            if present := num_rows(rows):
                seed_everything(job.spec.loop.seed, EVALUATION_COLLATE, number, shard)
                batch = to_device(job.collate(rows), context.device)
                seed_everything(job.spec.loop.seed, EVALUATION, number, shard)
                evaluation.add(contracts.evaluate(job.task, model, batch, present), present)
