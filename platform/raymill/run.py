"""The story of one job: check, plan, start Ray, train, track, register, sum up."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raymill import load, manifest, plan
from raymill.checkpoint import write_file
from raymill.cluster import find_facts, unsafe_variables
from raymill.driver import lease
from raymill.errors import InputError, Problem, did_you_mean
from raymill.home import RunFolder, run_folder, runs_folder
from raymill.manifest import Manifest
from raymill.plan import Plan
from raymill.spec import JobSpec
from raymill.supervisor import supervise
from raymill.task import Pipeline
from raymill.tracking import environment, show_run

Event = dict[str, Any]
Show = Callable[[Event], None]
Watch = Callable[[RunFolder], Show]

STOP_FILE = "stop"


@dataclass(frozen=True)
class Prepared:
    """A job that was found right, with everything that is derived from it.

    Attributes:
        spec: the resolved job.
        pipeline: its data.
        manifest: what the data hold now.
        plan: every derived number.
    """

    spec: JobSpec
    pipeline: Pipeline
    manifest: Manifest
    plan: Plan


def prepare(job: load.LoadedJob) -> Prepared:
    """Check a job against its data and this machine, or the cluster that RAY_ADDRESS names. Starts nothing.

    Args:
        job: from `load.examine_job`: what is right of it is checked further, also when some of it is wrong.

    Raises:
        InputError: with everything that is wrong, the job's own problems included.
    """
    problems, facts = [*unsafe_variables(os.environ), *job.problems], find_facts()
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
    return Prepared(job.spec, pipeline, taken, plan.make_plan(job.spec, taken, facts, job.where))


# ---------------------------------------------------------------- train


def train(prepared: Prepared, watch: Watch) -> dict[str, Any]:
    """Start a new run and train it to the end.

    Args:
        prepared: what to do.
        watch: is given the run's folder before anything starts; what it returns is given every event as it happens.

    Returns:
        The summary, which is also written to the run's folder.

    Raises:
        Interrupted: stopped on request, to be resumed.
        RunError: the run could not go on.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    folder = run_folder(f"{prepared.spec.name}-{stamp}-{secrets.token_hex(3)}")
    folder.path.mkdir(parents=True, mode=0o700)
    _write(folder.manifest, manifest.as_record(prepared.manifest))
    _write(folder.environment, environment())
    return _run(folder, prepared, watch)


def resume(run_id: str, num_workers: int | None, watch: Watch) -> dict[str, Any]:
    """Go on with an interrupted or failed run from its last checkpoint.

    Args:
        run_id: which run.
        num_workers: another number of workers, or None for the same.
        watch: see `train`.

    Raises:
        InputError: when there is no such run, it is finished, or its data changed.
    """
    if problems := unsafe_variables(os.environ):
        raise InputError(problems)
    folder = find_run(run_id)
    recorded = json.loads(folder.spec.read_text())
    if num_workers is not None:
        recorded["scale"] |= {"workers": num_workers, "min_workers": None, "max_workers": None}
    spec = JobSpec.model_validate(recorded)
    if show_run(run_id)["status"] == "finished":
        raise InputError(
            [Problem(f"--resume {run_id}", "a run that is finished", "an interrupted or failed run", "Start a new run.")]
        )
    pipeline = load.import_pipeline(spec)
    taken = manifest.take_manifest(pipeline, lenient=spec.bad_rows.lenient)
    changed = manifest.differences(manifest.from_record(json.loads(folder.manifest.read_text())), taken)
    if changed:
        raise InputError(changed)
    planned = plan.make_plan(spec, taken, find_facts(), lambda field: f"run {run_id} {field}")
    return _run(folder, Prepared(spec, pipeline, taken, planned), watch)


def find_run(run_id: str) -> RunFolder:
    """The folder of a run that exists.

    Raises:
        InputError: with the nearest run's id.
    """
    folder = run_folder(run_id)
    known = [path.name for path in runs_folder().iterdir()] if runs_folder().is_dir() else []
    if run_id not in known or not folder.spec.exists():
        raise InputError([Problem("RUN", repr(run_id), "the id of a run of this project", did_you_mean(run_id, known))])
    return folder


def _run(folder: RunFolder, prepared: Prepared, watch: Watch) -> dict[str, Any]:
    with lease(folder.owner):
        # A driver may have outlived the command that started it.
        with lease(folder.lease):
            _write(folder.spec, load.resolved(prepared.spec))
            _write(folder.plan, prepared.plan.as_record())
            _write(folder.command, {"started_s": psutil.Process().create_time()})
            folder.stop.unlink(missing_ok=True)
        summary = supervise(folder, prepared.spec, watch(folder))
        _write(folder.summary, summary)
    return summary


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(values, indent=1))
