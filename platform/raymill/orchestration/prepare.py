"""A job is held against its data and against what there is to run on, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from raymill.config import load, plan
from raymill.config.job_code import code_of
from raymill.config.plan import ClusterFacts, Plan
from raymill.config.spec import JobSpec
from raymill.data import manifest
from raymill.data.manifest import Manifest
from raymill.errors import InputError, Problem
from raymill.files import read_record
from raymill.orchestration.cluster_facts import unsafe_variables
from raymill.record import kept_code
from raymill.record.catalog import find_run, show_run
from raymill.record.folder import RunFolder
from raymill.task import Pipeline
from raymill.tracking.mlflow_client import store_problems


@dataclass(frozen=True)
class Prepared:
    """A job that was found right, with everything that is derived from it.

    Attributes:
        spec: the resolved job.
        pipeline: its data.
        manifest: what the data hold now.
        plan: every derived number.
        code: the job's own code, as it is now; see `job_code`.
    """

    spec: JobSpec
    pipeline: Pipeline
    manifest: Manifest
    plan: Plan
    code: Mapping[str, bytes]


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
            pipeline = load.import_pipeline(job.spec)
            taken = manifest.take_manifest(pipeline, lenient=job.spec.bad_rows.lenient)
        except InputError as error:
            problems += error.problems
    if job.is_sound(*plan.JUDGED):
        problems += plan.find_problems(job.spec, taken, facts, job.where)
    if problems or pipeline is None or taken is None:
        raise InputError(problems)
    return Prepared(job.spec, pipeline, taken, plan.make_plan(job.spec, taken, facts, job.where), code_of(job.spec))


def prepare_resume(
    run_id: str, num_workers: int | None, facts: ClusterFacts, *, accept_code_changes: bool = False
) -> tuple[RunFolder, Prepared]:
    """Check whether a run can go on, with its data and its code as they were.

    Args:
        num_workers: another number of workers, or None for the same.
        accept_code_changes: go on with other code too, which ends with other weights.

    Raises:
        InputError: when there is no such run, it is finished, its data changed, or its code did.
    """
    if problems := [*unsafe_variables(os.environ), *store_problems()]:
        raise InputError(problems)
    folder, known = find_run(run_id), show_run(run_id)
    if known["status"] in ("finished", "damaged"):
        found = "a run that is finished" if known["status"] == "finished" else known["message"]
        raise InputError([Problem(f"--resume {run_id}", found, "an interrupted or failed run", "Start a new run.")])
    spec, recorded_manifest = _read_records(folder, num_workers)
    code, recorded_code = code_of(spec), kept_code.read(folder.path)
    if recorded_code and not accept_code_changes and (other := kept_code.changes_since(folder.path, recorded_code, code)):
        raise InputError(kept_code.problems(run_id, other))
    pipeline = load.import_pipeline(spec)
    taken = manifest.take_manifest(pipeline, lenient=spec.bad_rows.lenient)
    if changed := manifest.differences(recorded_manifest, taken):
        raise InputError(changed)
    planned = plan.make_plan(spec, taken, facts, lambda field: f"run {run_id} {field}")
    return folder, Prepared(spec, pipeline, taken, planned, code)


def _read_records(folder: RunFolder, num_workers: int | None) -> tuple[JobSpec, Manifest]:
    """The job, with another number of workers where one is given, and the input of a run as they were written down."""
    try:
        recorded = read_record(folder.spec)
        if num_workers is not None:
            recorded["scale"] |= {"workers": num_workers, "min_workers": None, "max_workers": None}
        return JobSpec.model_validate(recorded), manifest.from_record(read_record(folder.data_manifest))
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"records that cannot be read: {type(error).__name__}: {error}"
        fix = "Restore the run's folder, or start a new run."
        raise InputError([Problem(f"--resume {folder.run_id}", found, "a run whose records are whole", fix)]) from error
