"""Every derived number of a job: a pure function of the spec, the data's size and the cluster's size.

No effects, no Ray, no torch. What the job file leaves `null` is decided here, and each decision keeps its reason, which
`raymill plan` prints. A job that cannot run is refused here, with the numbers and the way out, before anything starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raymill.config import evaluations
from raymill.config.spec import EvaluationSpec, JobSpec
from raymill.data.manifest import Manifest, SplitManifest
from raymill.data.order import BatchSharding, EvaluationOrder, JobOrder, SplitOrder, num_batches
from raymill.errors import InputError, Problem
from raymill.task import TRAIN, VALIDATION

WINDOW_BYTES = 16 * 2**20
"""Aim for the source bytes of a window: large enough to read in one go, small enough to resume cheaply."""

MOST_WINDOW_BYTES = 256 * 2**20
"""Of source; a window is read at once, whatever a batch is."""

CHUNK_BYTES = 128 * 2**20
"""Behind the transform; a window that becomes larger is transformed in chunks of half of that."""

MIN_WORKER_CPUS = 0.01
"""The smallest share of a CPU that can be reserved."""

MIN_WINDOWS_PER_EPOCH = 8
"""So that reading, transforming and training overlap also on small data."""

STRICT_SHARDS = 12
"""Shards of a strict step unless given."""

JUDGED = (
    "loop.global_batch_rows",
    "loop.gradient_accumulation_steps",
    "loop.strict",
    "loop.shards",
    "scale",
    "checkpoint.metric",
    "loop.early_stopping",
    "evaluate",
)
"""The fields that `find_problems` looks at."""

MAX_PROPOSED_WORKERS = 10_000
"""A refusal proposes no more workers than this."""

Where = Callable[[str], str]
"""Dotted field of the spec -> where the user wrote it."""


@dataclass(frozen=True, kw_only=True)
class ClusterFacts:
    """What there is to run on.

    Attributes:
        num_cpus: CPUs that Ray may give out, all nodes together.
        num_gpus: GPUs likewise.
        memory_bytes: memory of this machine.
        is_shared: others may use what this run leaves, and leave nothing: a cluster, rather than a Ray of our own.
    """

    num_cpus: float
    num_gpus: float
    memory_bytes: int
    is_shared: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will be done, in numbers. See `reasons` for why.

    Attributes:
        num_workers: worker processes; the most, where it may change.
        min_workers: the fewest that the run goes on with.
        worker_cpus: CPUs reserved for each worker.
        data_cpus: CPUs left for Ray Data.
        read_task_cpus: CPUs each reading task asks for; 0: it takes what is left, with no more tasks than `data_cpus`.
        threads: CPU threads per worker for tensor operations.
        global_batch_rows: rows of a step.
        shards_per_worker: backward passes of each worker per step, where the number of shards follows the workers.
        strict_shards: the fixed number of shards of a strict step; 0: not strict.
        train_rows: rows of a training epoch.
        validation_rows: rows of the split "validation"; 0: there is none.
        num_evaluations: of all splits, in the whole job.
        steps_per_epoch: optimizer steps of an epoch; the last may have fewer rows.
        total_steps: optimizer steps of the job.
        window_rows: rows read and shuffled together, about.
        chunk_rows: rows of a window that are transformed together; 0: all of them.
        train_windows: windows of a training epoch.
        validation_windows: windows of the split "validation".
        checkpoint_every_steps: steps between checkpoints, beside the one at each epoch's end.
        object_store_bytes: shared memory for an embedded Ray.
        bad_rows_budget: different rows that may be bad before the run fails.
        reasons: field -> why it has its value.
    """

    num_workers: int
    min_workers: int
    worker_cpus: float
    data_cpus: float
    read_task_cpus: float
    threads: int
    global_batch_rows: int
    shards_per_worker: int
    strict_shards: int
    train_rows: int
    validation_rows: int
    steps_per_epoch: int
    total_steps: int
    window_rows: int
    train_windows: int
    validation_windows: int
    checkpoint_every_steps: int
    object_store_bytes: int
    bad_rows_budget: int
    reasons: Mapping[str, str]
    num_evaluations: int = 0
    chunk_rows: int = 0

    @property
    def total_rows(self) -> int:
        """Rows trained on in the whole job, each as often as it is."""
        epochs, steps = divmod(self.total_steps, self.steps_per_epoch)
        return epochs * self.train_rows + min(steps * self.global_batch_rows, self.train_rows)

    def as_record(self) -> dict[str, Any]:
        """The plan as JSON-ready values; `from_record` makes an equal one."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Plan:
        """The plan of a record.

        Raises:
            TypeError: a number is missing or unknown.
        """
        return cls(**record)


def make_plan(
    spec: JobSpec,
    manifest: Manifest,
    facts: ClusterFacts,
    where: Where = str,
    *,
    row_bytes: int | None = None,
    before: Plan | None = None,
) -> Plan:
    """Derive every number of a job.

    Args:
        row_bytes: of a training row behind the transform; None: it is not known.
        before: the plan by which the run was begun, whose windows it keeps.

    Raises:
        InputError: with everything that does not fit together, numbers and ways out included.
    """
    if problems := find_problems(spec, manifest, facts, where):
        raise InputError(problems)

    why: dict[str, str] = {}
    workers = spec.scale.max_num_workers
    train, validation = manifest.splits[TRAIN], manifest.splits.get(VALIDATION)
    worker_cpus, data_cpus = _cpus(spec, facts, why)
    window_rows, chunk_rows = _windows(spec, train, row_bytes, before, why)
    steps_per_epoch = num_batches(train.num_rows, spec.loop.global_batch_rows)
    total_steps = spec.loop.steps or spec.loop.epochs * steps_per_epoch
    split_rows = {split: known.num_rows for split, known in manifest.splits.items()}
    measured = spec.evaluations(split_rows)
    why["num_evaluations"] = evaluations.described(measured, split_rows)
    threads = _threads(spec, facts, why)
    _explain_counts(spec, manifest, facts, why)
    every = spec.checkpoint.every_steps or steps_per_epoch
    object_store_bytes = int(min(2 * 2**30, max(256 * 2**20, 0.1 * facts.memory_bytes)))
    return Plan(
        num_workers=workers,
        min_workers=spec.scale.min_num_workers,
        worker_cpus=worker_cpus,
        data_cpus=data_cpus,
        read_task_cpus=0.0 if _may_be_full(spec, facts) else min(1.0, data_cpus),
        threads=threads,
        global_batch_rows=spec.loop.global_batch_rows,
        shards_per_worker=spec.loop.gradient_accumulation_steps,
        strict_shards=strict_shards(spec) if spec.loop.strict else 0,
        train_rows=train.num_rows,
        validation_rows=validation.num_rows if validation else 0,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        window_rows=window_rows,
        train_windows=num_batches(train.num_rows, window_rows),
        validation_windows=num_batches(validation.num_rows, window_rows) if validation else 0,
        checkpoint_every_steps=every,
        object_store_bytes=object_store_bytes,
        bad_rows_budget=_bad_rows_budget(spec, train.num_rows, why),
        reasons=why,
        chunk_rows=chunk_rows,
        num_evaluations=sum(evaluations.count(one, steps_per_epoch, total_steps) for one in measured),
    )


def _may_be_full(spec: JobSpec, facts: ClusterFacts) -> bool:
    """Whether workers may come to have every CPU: an elastic job's take what they find, and on a cluster there are other runs."""
    return spec.scale.elastic or facts.is_shared


def _explain_counts(spec: JobSpec, manifest: Manifest, facts: ClusterFacts, why: dict[str, str]) -> None:
    """The reasons of numbers that are taken over or follow from others at once."""
    elastic = "what the cluster has room for, from scale.min_workers to scale.max_workers"
    given = "scale.workers" if spec.scale.workers is not None else "1, unless scale.workers says otherwise"
    why["num_workers"] = elastic if spec.scale.elastic else given
    why["min_workers"] = "scale.min_workers" if spec.scale.elastic else "the number of workers is fixed"
    why["read_task_cpus"] = (
        "0, because workers of this run or of others may have every CPU, and tasks that reserve one would wait for ever"
        if _may_be_full(spec, facts)
        else "1, or what is left for reading data if that is less"
    )
    why["global_batch_rows"] = "loop.global_batch_rows"
    rows = manifest.splits[TRAIN].num_rows
    steps = num_batches(rows, spec.loop.global_batch_rows)
    tail = rows % spec.loop.global_batch_rows
    why["steps_per_epoch"] = f"{rows} rows / {spec.loop.global_batch_rows} per step" + (
        f"; the last step has {tail} rows and counts by its true size" if tail else ""
    )
    why["total_steps"] = "loop.steps" if spec.loop.steps else f"{spec.loop.epochs} epochs x {steps} steps"
    why["shards_per_worker"] = "loop.gradient_accumulation_steps"
    why["strict_shards"] = "the same at any number of workers" if spec.loop.strict else "not strict: shards follow the workers"
    why["checkpoint_every_steps"] = "given" if spec.checkpoint.every_steps else "once per epoch, after its evaluation"
    why["object_store_bytes"] = "a tenth of memory, between 256 MiB and 2 GiB; only for a Ray that raymill starts"
    for split in (TRAIN, VALIDATION):
        known = manifest.splits.get(split)
        why[f"{split}_rows"] = f"the manifest: {len(known.fragments)} fragments" if known else "the pipeline has no such split"
        why[f"{split}_windows"] = f"{split}_rows / window_rows, rounded up" if known else "the pipeline has no such split"


def find_problems(spec: JobSpec, manifest: Manifest | None, facts: ClusterFacts, where: Where = str) -> list[Problem]:
    """Everything that does not fit together; without a manifest, all of it that is so whatever the data are."""
    problems = _batch_problems(spec, where)
    if manifest is not None:
        split_rows = {split: known.num_rows for split, known in manifest.splits.items()}
        problems += evaluations.find_problems(spec, split_rows, where)
    return [*problems, *_resource_problems(spec, facts, where)]


def _batch_problems(spec: JobSpec, where: Where) -> list[Problem]:
    batch, workers, gradient_accumulation_steps = (
        spec.loop.global_batch_rows,
        spec.scale.max_num_workers,
        spec.loop.gradient_accumulation_steps,
    )
    if spec.loop.strict or spec.scale.elastic:
        # Shards may then differ by a row: the shard count is fixed, or the worker count is not known before.
        pieces = strict_shards(spec) if spec.loop.strict else workers * gradient_accumulation_steps
        if workers <= pieces <= batch:
            return []
        return [
            Problem(
                where("loop.shards" if spec.loop.strict else "scale.max_workers"),
                f"{workers} workers, {pieces} shards and {batch} rows per step",
                "at least one shard for each worker and one row for each shard",
                f"Raise loop.global_batch_rows to at least {max(pieces, workers)}, or use fewer workers or shards.",
            )
        ]
    if batch % (workers * gradient_accumulation_steps) == 0:
        return []
    fitting = [count for count in range(1, MAX_PROPOSED_WORKERS + 1) if batch % (count * gradient_accumulation_steps) == 0]
    lower = max((count for count in fitting if count < workers), default=None)
    upper = min((count for count in fitting if count > workers), default=None)
    near = " or ".join(str(count) for count in (lower, upper) if count)
    multiple = f"set loop.global_batch_rows to a multiple of {workers * gradient_accumulation_steps}."
    return [
        Problem(
            where("scale.workers"),
            f"{workers} workers x {gradient_accumulation_steps} backward passes with {batch} rows per step",
            "a product that divides loop.global_batch_rows",
            f"Use {near} workers, or {multiple}" if near else multiple.capitalize(),
        )
    ]


def _resource_problems(spec: JobSpec, facts: ClusterFacts, where: Where) -> list[Problem]:
    problems = []
    # An elastic job begins with what is there now.
    workers = spec.scale.min_num_workers
    if spec.scale.elastic:
        asked = workers * (spec.scale.cpus_per_worker or MIN_WORKER_CPUS)
        if asked > facts.num_cpus:
            problems.append(
                Problem(
                    where("scale.cpus_per_worker" if spec.scale.cpus_per_worker else "scale.min_workers"),
                    f"at least {workers} workers x {asked / workers:g} CPUs = {asked:g} of {facts.num_cpus:g} CPUs",
                    "room for the least number of workers",
                    "Lower scale.min_workers or scale.cpus_per_worker.",
                )
            )
    elif spec.scale.cpus_per_worker is not None:
        asked = workers * spec.scale.cpus_per_worker
        if asked + _min_data_cpus(facts) > facts.num_cpus:
            most = (facts.num_cpus - _min_data_cpus(facts)) / workers
            problems.append(
                Problem(
                    where("scale.cpus_per_worker"),
                    f"{workers} workers x {spec.scale.cpus_per_worker:g} CPUs = {asked:g} of {facts.num_cpus:g} CPUs",
                    f"at least {_min_data_cpus(facts):g} CPU left for reading data, or no row would ever arrive",
                    f"Set scale.cpus_per_worker to at most {np.floor(most * 100) / 100:g}, or to null to derive it.",
                )
            )
    elif MIN_WORKER_CPUS * workers + _min_data_cpus(facts) > facts.num_cpus:
        most_workers = int((facts.num_cpus - _min_data_cpus(facts)) / MIN_WORKER_CPUS)
        problems.append(
            Problem(
                where("scale.workers"),
                f"{workers} workers on {facts.num_cpus:g} CPUs, {_min_data_cpus(facts):g} of them kept for reading data",
                f"at least {MIN_WORKER_CPUS:g} CPU for each worker",
                f"Use at most {most_workers} workers.",
            )
        )
    gpus = workers * spec.scale.gpus_per_worker
    if gpus > facts.num_gpus:
        problems.append(
            Problem(
                where("scale.gpus_per_worker"),
                f"{workers} workers x {spec.scale.gpus_per_worker:g} GPUs = {gpus:g} of {facts.num_gpus:g} GPUs",
                "no more GPUs than there are",
                "Set scale.gpus_per_worker to 0 to train on CPUs, or use fewer workers.",
            )
        )
    return problems


def strict_shards(spec: JobSpec) -> int:
    """Pieces that a strict step is computed in: given, or 12, which 1, 2, 3, 4, 6 and 12 workers share evenly."""
    return spec.loop.shards or max(min(STRICT_SHARDS, spec.loop.global_batch_rows), spec.scale.max_num_workers)


def _min_data_cpus(facts: ClusterFacts) -> float:
    return min(1.0, facts.num_cpus / 2)


def _cpus(spec: JobSpec, facts: ClusterFacts, why: dict[str, str]) -> tuple[float, float]:
    workers = spec.scale.max_num_workers
    if _may_be_full(spec, facts):
        return _whole_cpus(spec, facts, why)
    if spec.scale.cpus_per_worker is not None:
        worker_cpus = spec.scale.cpus_per_worker
        why["worker_cpus"] = "given"
    elif facts.num_cpus >= workers + 1:
        worker_cpus = 1.0
        why["worker_cpus"] = f"{facts.num_cpus:g} CPUs are enough for 1 each and 1 for reading data"
    else:
        share = (facts.num_cpus - _min_data_cpus(facts)) / workers
        worker_cpus = max(MIN_WORKER_CPUS, float(np.floor(share * 100) / 100))
        why["worker_cpus"] = (
            f"{facts.num_cpus:g} CPUs, {_min_data_cpus(facts):g} kept for reading data, the rest shared by {workers} workers"
        )
    data_cpus = round(facts.num_cpus - workers * worker_cpus, 2)
    why["data_cpus"] = f"{facts.num_cpus:g} - {workers} x {worker_cpus:g}, so that workers never wait for ever for a row"
    return worker_cpus, data_cpus


def _whole_cpus(spec: JobSpec, facts: ClusterFacts, why: dict[str, str]) -> tuple[float, float]:
    least, most = spec.scale.min_num_workers, spec.scale.max_num_workers
    if spec.scale.cpus_per_worker is not None:
        worker_cpus = spec.scale.cpus_per_worker
        why["worker_cpus"] = "given"
    elif facts.num_cpus >= least:
        worker_cpus = 1.0
        why["worker_cpus"] = "1 each, whatever the number of CPUs and of workers is later"
    else:
        worker_cpus = max(MIN_WORKER_CPUS, float(np.floor(facts.num_cpus / least * 100) / 100))
        why["worker_cpus"] = f"{facts.num_cpus:g} CPUs shared by at least {least} workers"
    why["data_cpus"] = "what the workers would leave now, at least 1; reading reserves none of it, so it never waits for a CPU"
    return worker_cpus, round(max(1.0, facts.num_cpus - most * worker_cpus), 2)


def _threads(spec: JobSpec, facts: ClusterFacts, why: dict[str, str]) -> int:
    if spec.loop.threads is not None:
        why["threads"] = "given"
        return spec.loop.threads
    if spec.loop.strict or spec.scale.elastic:
        why["threads"] = "1, because sums may round differently with more, and the number of workers may change"
        return 1
    if facts.is_shared:
        why["threads"] = "the CPUs of a worker, at least 1: the others are for other runs"
        return max(1, int(spec.scale.cpus_per_worker or 1))
    why["threads"] = f"{facts.num_cpus:g} CPUs / {spec.scale.max_num_workers} workers, at least 1"
    return max(1, int(facts.num_cpus) // spec.scale.max_num_workers)


def _windows(
    spec: JobSpec, train: SplitManifest, row_bytes: int | None, before: Plan | None, why: dict[str, str]
) -> tuple[int, int]:
    """Rows of a window, and of a chunk of it."""
    if before is not None:
        why |= {name: before.reasons.get(name, "as the run began") for name in ("window_rows", "chunk_rows")}
        return before.window_rows, before.chunk_rows
    window_rows = _window_rows(spec, train.num_rows, train.num_bytes, why)
    return window_rows, _chunk_rows(window_rows, row_bytes, why)


def _window_rows(spec: JobSpec, num_rows: int, num_bytes: int, why: dict[str, str]) -> int:
    if spec.loop.window_rows is not None:
        why["window_rows"] = "given"
        return spec.loop.window_rows
    by_bytes = max(1, WINDOW_BYTES * num_rows // max(1, num_bytes))
    by_share = num_batches(num_rows, MIN_WINDOWS_PER_EPOCH)
    by_batch = 4 * spec.loop.global_batch_rows
    most = max(1, MOST_WINDOW_BYTES * num_rows // max(1, num_bytes))
    why["window_rows"] = (
        f"the least of {by_bytes} (16 MiB), {by_share} (an eighth of an epoch); but at least 4 batches: {by_batch}"
        + (f"; and at most {most} (256 MiB)" if by_batch > most else "")
    )
    return min(max(min(by_bytes, by_share), min(by_batch, most)), num_rows)


def _chunk_rows(window_rows: int, row_bytes: int | None, why: dict[str, str]) -> int:
    if row_bytes is None:
        why["chunk_rows"] = "0, for whole windows: how large a row becomes by the transform could not be told"
        return 0
    if window_rows * row_bytes <= CHUNK_BYTES:
        why["chunk_rows"] = f"0, for whole windows: rows of {row_bytes} bytes behind the transform fit into 128 MiB"
        return 0
    why["chunk_rows"] = f"rows of {row_bytes} bytes behind the transform, 64 MiB at a time"
    return max(1, CHUNK_BYTES // 2 // row_bytes)


def _bad_rows_budget(spec: JobSpec, num_rows: int, why: dict[str, str]) -> int:
    if not spec.bad_rows.lenient:
        why["bad_rows_budget"] = "bad_rows.policy is fail"
        return 0
    if spec.bad_rows.budget is not None:
        why["bad_rows_budget"] = "given"
        return spec.bad_rows.budget
    why["bad_rows_budget"] = f"1 % of {num_rows} training rows, rounded up"
    return num_batches(num_rows, 100)


def job_order(spec: JobSpec, plan: Plan, manifest: Manifest) -> JobOrder:
    """The order of samples of a planned job."""

    def split_order(split: str, num_windows: int) -> SplitOrder:
        fragment_rows = np.array([fragment.num_rows for fragment in manifest.splits[split].fragments], np.int64)
        return SplitOrder(split, fragment_rows, num_windows, spec.loop.seed, shuffle=split == TRAIN)

    def evaluation_order(evaluation: EvaluationSpec) -> EvaluationOrder:
        num_rows = manifest.splits[evaluation.split].num_rows
        order = split_order(evaluation.split, num_batches(num_rows, plan.window_rows))
        measured = min(evaluation.rows or num_rows, num_rows)
        return EvaluationOrder(order, measured, evaluations.every_steps(evaluation, plan.steps_per_epoch))

    measured = tuple(evaluation_order(evaluation) for evaluation in spec.evaluations(manifest.splits))
    return JobOrder(split_order(TRAIN, plan.train_windows), measured, plan.total_steps, plan.global_batch_rows)


def batch_shardings(plan: Plan, order: JobOrder, world_size: int) -> dict[str, BatchSharding]:
    """Split -> how its batches are dealt out to this many ranks."""
    num_shards = plan.strict_shards or world_size * plan.shards_per_worker
    train = BatchSharding(plan.train_rows, plan.global_batch_rows, num_shards, world_size)
    # An evaluation's batches stay the same whatever the number of ranks is.
    measured = {
        one.split.split: BatchSharding(one.num_rows, plan.global_batch_rows, plan.num_workers, world_size)
        for one in order.evaluations
    }
    return {TRAIN: train, **measured}


def explain(plan: Plan) -> list[tuple[str, str, str]]:
    """Each number of the plan as (name, value, reason), for people."""
    record = plan.as_record()
    reasons = record.pop("reasons")
    return [(name, f"{value:g}" if isinstance(value, float) else str(value), reasons[name]) for name, value in record.items()]
