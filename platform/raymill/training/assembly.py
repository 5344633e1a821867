"""A job's parts put together, once, for every executor: order, batch sharding, reader, task.

Whoever runs a job (a Ray worker, this process, an evaluation, a test) calls `assemble`, so that none can read other rows than
another. This file imports no torch: rank 0 opens the stream while torch is still being imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from raymill.config import load
from raymill.config.job_code import code_when_imported
from raymill.config.plan import Plan, batch_shardings, job_order
from raymill.config.spec import JobSpec
from raymill.data.manifest import Manifest
from raymill.data.order import BatchSharding, JobOrder
from raymill.data.reader import Reader
from raymill.errors import InputError
from raymill.record import kept_code
from raymill.record.events import AttemptStarted
from raymill.record.processes import ProcessId
from raymill.record.store import ResumePoint
from raymill.task import Batch, Fragment, Pipeline, Rows, Task
from raymill.trained.model import Trained

if TYPE_CHECKING:
    import torch

    from raymill.record.remote_store import RunStore


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """Where a worker is.

    Attributes:
        rank: 0..world_size-1.
        world_size: ranks.
        device: where the model lives.
        store: the run's folder.
    """

    rank: int
    world_size: int
    device: torch.device
    store: RunStore


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What a worker is to do.

    Attributes:
        spec: the resolved job.
        plan: every derived number.
        pipeline: its data.
        make_task: makes the user's Task; imports torch.
        order: the order of samples.
        shardings: split -> how batches are dealt out to the ranks.
        fragments: split -> its fragments, as in the manifest.
        check_code: raises where the job's own code, once imported, is not the run's; called in each process that imports it.
    """

    spec: JobSpec
    plan: Plan
    pipeline: Pipeline
    make_task: Callable[[], Task]
    order: JobOrder
    shardings: Mapping[str, BatchSharding]
    fragments: Mapping[str, Sequence[Fragment]]
    check_code: Callable[[], None]

    @cached_property
    def task(self) -> Task:
        """The user's Task."""
        return self.make_task()

    @cached_property
    def collate(self) -> Callable[[Rows], Batch]:
        """Rows -> batch."""
        from raymill.own_code import contracts
        from raymill.training.batch import default_collate

        return partial(contracts.collated, self.pipeline.collate or default_collate)

    def going_on(self, point: ResumePoint) -> Job:
        """The job as an attempt goes on with it: cut short where its end was decided before its last step."""
        return replace(self, order=self.order.ending_at(point.position)) if point.ended else self

    def reader(self, name: str) -> Reader:
        """Reads the windows of the job's stream; `name` tells readers of different runs and attempts apart."""
        lenient = self.spec.bad_rows.lenient
        parts = self.order, self.shardings, self.fragments, self.pipeline
        return Reader(name, *parts, lenient, self.check_code, self.plan.chunk_rows)


def assemble(
    spec: JobSpec,
    plan: Plan,
    manifest: Manifest,
    pipeline: Pipeline,
    world_size: int,
    make_task: Callable[[], Task] | None = None,
    check_code: Callable[[], None] = lambda: None,
    fitted: Mapping[str, bytes] = load.NOTHING_FITTED,
    inputs: Mapping[str, Trained] = load.NO_INPUTS,
) -> Job:
    """Put a job together for this many ranks.

    Args:
        make_task: makes the Task; None: the one that the spec names.
        fitted: what the pipeline has fitted, for the task.
        inputs: the models that it is given.
        check_code: see `Job`; not needed where one process imports the code once and does all.
    """
    order = job_order(spec, plan, manifest)
    return Job(
        spec=spec,
        plan=plan,
        pipeline=pipeline,
        make_task=make_task or (lambda: load.import_task(spec, pipeline.schema, fitted, inputs)),
        order=order,
        shardings=batch_shardings(plan, order, world_size),
        fragments={split: part.fragments for split, part in manifest.splits.items()},
        check_code=check_code,
    )


def refuse_other_code(run_id: str, recorded: Mapping[str, str], *specs: JobSpec) -> None:
    """The code that this process has imported must be the code that the run was trained with so far.

    Args:
        recorded: name -> SHA-256 of each file of the run's code.
        specs: the job, and those of the models that it is given.

    Raises:
        InputError: names each file that differs.
    """
    if found := kept_code.changes(recorded, code_when_imported(*specs)):
        raise InputError(kept_code.problems(run_id, found))


def attempt_started(job: Job, point: ResumePoint, world_size: int, driver: ProcessId) -> AttemptStarted:
    """The event that tells of a new attempt."""
    return AttemptStarted(
        attempt=point.attempt,
        num_workers=world_size,
        step=job.order.step(point.position),
        num_total_steps=job.order.total_steps,
        resumed=point.checkpoint is not None and point.position > 0,
        notes=point.notes,
        pid=driver.pid,
        process_started_s=driver.started_s,
    )
