"""A job is held against its data and against what there is to run on, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raymill.config import load, plan, resumed
from raymill.config.job_code import code_of
from raymill.config.plan import ClusterFacts, Plan
from raymill.config.spec import JobSpec
from raymill.data import fit, manifest
from raymill.data.manifest import Manifest
from raymill.data.reader import transformed_row_bytes
from raymill.errors import DataError, InputError, Problem
from raymill.files import read_record
from raymill.orchestration.cluster_facts import unsafe_variables
from raymill.orchestration.given import Start, find_inputs, find_start
from raymill.own_code.seams import FIT, PIPELINE, problem
from raymill.record import fitted as record_fitted
from raymill.record import kept_code
from raymill.record.catalog import find_run, show_run
from raymill.record.folder import RunFolder
from raymill.task import TRAIN, Pipeline
from raymill.tracking.mlflow_client import store_problems
from raymill.trained.model import Trained, read_inputs
from raymill.training.assembly import Job, assemble


@dataclass(frozen=True)
class Prepared:
    """A job that was found right, with everything that is derived from it.

    Attributes:
        spec: the resolved job.
        pipeline: its data.
        manifest: what the data hold now.
        plan: every derived number.
        facts: what there is to run on.
        code: the job's own code, as it is now; see `job_code`.
        inputs: the models that the job is given, by name.
        start: what the run begins with, where the job says `init_from`; None once it has begun.
        fitted: what the pipeline has fitted, by name.
        where: dotted field of the job -> where its user wrote it.
    """

    spec: JobSpec
    pipeline: Pipeline
    manifest: Manifest
    plan: Plan
    facts: ClusterFacts
    code: Mapping[str, bytes]
    inputs: Mapping[str, Trained] = field(default_factory=dict)
    start: Start | None = None
    fitted: Mapping[str, bytes] = field(default_factory=dict)
    where: Callable[[str], str] = str


def prepare(job: load.LoadedJob, facts: ClusterFacts) -> Prepared:
    """Check a job against its data and what there is to run on. Starts nothing.

    Args:
        job: from `load.examine_job`: what is right of it is checked further, also when some of it is wrong.
        facts: what there is to run on.

    Raises:
        InputError: with everything that is wrong, the job's own problems included.
    """
    problems = [*unsafe_variables(os.environ), *store_problems(), *job.problems]
    pipeline = taken = None
    if job.is_sound("pipeline", "data"):
        try:
            pipeline = _pipeline(job.spec)
            taken = manifest.take_manifest(pipeline, lenient=job.spec.bad_rows.lenient)
        except InputError as error:
            problems += error.problems
    if job.is_sound(*plan.JUDGED):
        problems += plan.find_problems(job.spec, taken, facts, job.where)
    inputs, of_inputs = find_inputs(job.spec, job.where) if job.is_sound("inputs") else ({}, [])
    if problems or of_inputs or pipeline is None or taken is None:
        raise InputError([*problems, *of_inputs])
    planned = _planned(job.spec, pipeline, taken, facts, job.where)
    start = find_start(job.spec, planned, taken, job.where) if job.spec.init_from else None
    code = code_of(job.spec, *(one.spec for one in inputs.values()))
    return Prepared(job.spec, pipeline, taken, planned, facts, code, inputs, start, where=job.where)


def fitted(prepared: Prepared) -> Prepared:
    """The same with its pipeline fitted, where that has something to fit: it reads all training rows.

    Raises:
        InputError, DataError: the pipeline's `fit` is wrong, or rows cannot be read.
    """
    spec, fragments = prepared.spec, prepared.manifest.splits[TRAIN].fragments
    try:
        made = fit.fit(prepared.pipeline, fragments, spec.loop.seed, lenient=spec.bad_rows.lenient)
    except (InputError, DataError):
        raise
    except (Exception, SystemExit) as error:
        raise InputError([problem(FIT, error, prepared.pipeline.fit)]) from error
    if not made:
        return prepared
    pipeline = _pipeline(spec, made)
    planned = _planned(spec, pipeline, prepared.manifest, prepared.facts, prepared.where)
    return replace(prepared, fitted=made, pipeline=pipeline, plan=planned)


def _planned(spec: JobSpec, pipeline: Pipeline, taken: Manifest, facts: ClusterFacts, where: Callable[[str], str]) -> Plan:
    """The plan of a job that begins."""
    fragments = taken.splits[TRAIN].fragments
    row_bytes = transformed_row_bytes(pipeline, fragments, spec.loop.seed, lenient=spec.bad_rows.lenient)
    return plan.make_plan(spec, taken, facts, where, row_bytes=row_bytes)


def assembled(prepared: Prepared, world_size: int) -> Job:
    """The job for this many ranks."""
    parts = prepared.spec, prepared.plan, prepared.manifest, prepared.pipeline
    return assemble(*parts, world_size, fitted=prepared.fitted, inputs=prepared.inputs)


def prepare_resume(
    run_id: str,
    num_workers: int | None,
    facts: ClusterFacts,
    overrides: Sequence[str] = (),
    *,
    accept_code_changes: bool = False,
) -> tuple[RunFolder, Prepared]:
    """Check whether a run can go on, with its data and its code as they were.

    Args:
        num_workers: another number of workers, or None for the same.
        facts: what there is to run on.
        overrides: "field.path=value" each, of fields that may change.
        accept_code_changes: go on with other code too, which ends with other weights.

    Raises:
        InputError: when there is no such run, it is finished, its data or its code changed, or a field may not change.
    """
    if problems := [*unsafe_variables(os.environ), *store_problems()]:
        raise InputError(problems)
    folder, known = find_run(run_id), show_run(run_id)
    if known["status"] in ("finished", "damaged"):
        found = "a run that is finished" if known["status"] == "finished" else known["message"]
        raise InputError([Problem(f"--resume {run_id}", found, "an interrupted or failed run", "Start a new run.")])
    recorded, recorded_manifest, before = _read_records(folder, num_workers)
    spec = resumed.changed(recorded, overrides)
    given = {text.partition("=")[0] for text in overrides}

    def where(field: str) -> str:
        return f"--set {field}" if field in given else f"run {run_id} {field}"

    inputs = read_inputs(folder.path)
    code, recorded_code = code_of(spec, *(one.spec for one in inputs.values())), kept_code.read(folder.path)
    if recorded_code and not accept_code_changes and (other := kept_code.changes_since(folder.path, recorded_code, code)):
        raise InputError(kept_code.problems(run_id, other))
    kept = record_fitted.read(folder.path)
    pipeline = _pipeline(spec, kept)
    if pipeline.fit is not None and not kept:
        fix = "Restore the file from the run's folder, or start a new run."
        raise InputError([Problem(f"--resume {run_id}", f"no {record_fitted.FILE}", "what the pipeline fitted for the run", fix)])
    taken = manifest.take_manifest(pipeline, lenient=spec.bad_rows.lenient)
    if changed := manifest.differences(recorded_manifest, taken):
        raise InputError(changed)
    planned = plan.make_plan(spec, taken, facts, where, before=before)
    return folder, Prepared(spec, pipeline, taken, planned, facts, code, inputs, fitted=kept, where=where)


def _pipeline(spec: JobSpec, fitted: Mapping[str, bytes] = load.NOTHING_FITTED) -> Pipeline:
    """The job's pipeline.

    Raises:
        InputError: it cannot be imported, or the function that makes it raises or returns something else.
    """
    try:
        return load.import_pipeline(spec, fitted)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError([problem(PIPELINE, error, spec.pipeline)]) from error


def _read_records(folder: RunFolder, num_workers: int | None) -> tuple[dict[str, Any], Manifest, Plan]:
    """The job, with another number of workers where one is given, the input and the plan of a run as they were written down."""
    try:
        recorded = read_record(folder.spec)
        if num_workers is not None:
            recorded["scale"] |= {"workers": num_workers, "min_workers": None, "max_workers": None}
        JobSpec.model_validate(recorded)
        planned = Plan.from_record(read_record(folder.plan))
        return recorded, manifest.from_record(read_record(folder.data_manifest)), planned
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"records that cannot be read: {type(error).__name__}: {error}"
        fix = "Restore the run's folder, or start a new run."
        raise InputError([Problem(f"--resume {folder.run_id}", found, "a run whose records are whole", fix)]) from error
