"""A run from the command to its summary: made or taken up again, handed to an executor."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from raymill.config import load
from raymill.data import manifest
from raymill.errors import InputError, Interrupted
from raymill.files import make_private_folder, replace_file, run_lock, write_record
from raymill.orchestration.attempts import Show, committed_step
from raymill.orchestration.executors import Executor
from raymill.orchestration.given import lay_down
from raymill.orchestration.prepare import Prepared, assembled, fitted, prepare_resume
from raymill.preflight.process import Refusal, here, no_look
from raymill.record import fitted as record_fitted
from raymill.record import kept_code
from raymill.record.environment import environment
from raymill.record.folder import RunFolder, run_folder
from raymill.trained.files import keep_inputs

Watch = Callable[[RunFolder], Show]
"""Is given a run's folder before anything starts; what it returns is given every event as it happens."""


def train(
    prepared: Prepared,
    executor: Executor,
    watch: Watch,
    started_s: float,
    *,
    preflight: bool = True,
    run_id: str | None = None,
    parent: str | None = None,
) -> dict[str, Any]:
    """Start a new run and train it to the end.

    Args:
        prepared: what to do.
        executor: who does it.
        watch: shows the run to people.
        started_s: when the command was given, Unix seconds.
        preflight: try the job's own code on a few rows first, or while the run starts.
        run_id: what it is called; None: by the job's name, the time and something at random.
        parent: the study that it is a trial of.

    Returns:
        The summary, which is also written to the run's folder.

    Raises:
        InputError: the job's own code is wrong; there is no run.
        Interrupted: stopped on request, to be resumed.
        RunError: the run could not go on.
    """
    prepared = fitted(prepared)
    folder = run_folder(run_id or new_id(prepared.spec.name))
    make_private_folder(folder.path)
    write_record(folder.data_manifest, manifest.as_record(prepared.manifest))
    write_record(folder.environment, {**environment(), **({"parent_run_id": parent} if parent else {})})
    record_fitted.keep(folder.path, prepared.fitted)
    start, given = prepared.start, {name: (prepared.spec.inputs[name], one) for name, one in prepared.inputs.items()}
    keep_inputs(folder.path, given, (start.given.model, start.trained) if start else None)
    if start is not None:
        lay_down(folder, start)
    try:
        return _execute(folder, prepared, executor, watch, started_s, preflight)
    except Refusal as refusal:
        # Ignored is what a process that is being ended writes there still.
        shutil.rmtree(folder.path, ignore_errors=True)
        raise InputError(refusal.problems) from refusal.__cause__


def new_id(name: str) -> str:
    """What a new run or study of a job is called."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def try_code(prepared: Prepared) -> None:
    """Try the job's own code on a few rows, in this process. No run is made.

    Raises:
        InputError: with what is wrong.
    """
    job = assembled(fitted(prepared), prepared.plan.num_workers)
    try:
        here(job, prepared.where, prepared.start.trained.weights if prepared.start else None)(False)
    except Refusal as refusal:
        raise InputError(refusal.problems) from refusal.__cause__


def resume(
    run_id: str,
    num_workers: int | None,
    overrides: Sequence[str],
    executor: Executor,
    watch: Watch,
    started_s: float,
    *,
    accept_code_changes: bool = False,
    preflight: bool = True,
) -> dict[str, Any]:
    """Go on with an interrupted or failed run from its last checkpoint; arguments and errors as those of `train`.

    Args:
        run_id: which run.
        num_workers: another number of workers, or None for the same.
        overrides: "field.path=value" each, of fields that may change.
        accept_code_changes: go on though the job's own code is another one now.

    Raises:
        InputError: when there is no such run, it is finished, its data or its code changed, a field may not change, or the
            job's own code is wrong; the run is as it was.
    """
    if executor.only_one_worker:
        num_workers = 1
    folder, prepared = prepare_resume(
        run_id, num_workers, executor.find_facts(), overrides, accept_code_changes=accept_code_changes
    )
    records = {path: path.read_text() for path in (folder.spec, folder.plan, folder.command) if path.exists()}
    try:
        return _execute(folder, prepared, executor, watch, started_s, preflight)
    except Refusal as refusal:
        for path, record in records.items():
            replace_file(path, record)
        raise InputError(refusal.problems) from refusal.__cause__


def _execute(
    folder: RunFolder, prepared: Prepared, executor: Executor, watch: Watch, started_s: float, preflight: bool
) -> dict[str, Any]:
    with run_lock(folder.command_lock):
        # A driver may have outlived the command that started it.
        with run_lock(folder.driver_lock):
            write_record(folder.spec, load.resolved(prepared.spec))
            write_record(folder.plan, prepared.plan.as_record())
            kept_code.keep(folder, prepared.code, committed_step(folder))
            write_record(folder.command, {"started_s": started_s, "executor": executor.name})
            folder.stop_request.unlink(missing_ok=True)
        with executor.preflight(folder, prepared) if preflight else nullcontext(no_look) as look:
            try:
                summary = executor.execute(folder, prepared, watch(folder), look)
            except (Interrupted, Refusal):
                raise
            except Exception as error:
                error.add_note(_way_on(folder, executor))
                raise
        write_record(folder.summary, summary)
    return summary


def _way_on(folder: RunFolder, executor: Executor) -> str:
    """What to look at when a run has failed, and how to go on with it."""
    in_process = " --in-process" if executor.only_one_worker else ""
    lines = [
        f"  raymill runs show {folder.run_id}",
        f"  raymill train --resume {folder.run_id}{in_process}",
        *([f"  what Ray and the workers printed: {folder.ray_log}"] if executor.has_ray_log else []),
    ]
    return "\n".join(["Next:", *lines])
