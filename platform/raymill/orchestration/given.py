"""What a job is given that other runs have made: models for its task, and what its weights begin with.

Found when the job is checked, and copied into the run's folder when the run begins: what a name points to later, and what
becomes of the other run, changes nothing any more. What a run begins with is laid down as its first checkpoint, so that it begins
as any attempt goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raymill.checkpoint.commit import commit
from raymill.checkpoint.directory import OPTIMIZER, RECORD, WEIGHTS, Content, find_latest, read_state
from raymill.config.plan import Plan, job_order
from raymill.config.spec import InitFromSpec, JobSpec
from raymill.data.manifest import Manifest, from_record
from raymill.errors import CheckpointError, InputError, Problem
from raymill.files import read_record
from raymill.models.find import at_checkpoint, find_model
from raymill.record.catalog import find_run
from raymill.record.folder import RunFolder
from raymill.task import TRAIN
from raymill.trained.model import Trained

ATTEMPT = 0
"""Whose checkpoint it is that a run begins with: before its first attempt."""

NEW: Mapping[str, object] = {
    "ended": None, "worked_s": 0.0, "patience": {}, "best": None, "best_by": "", "metrics": {}, "is_best": False,
}  # fmt: skip
"""What of a state is of a run, and not of what it has learned."""


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        trained: whose weights.
        given: what the job says of it.
        step: optimizer steps of this job that are done by then.
    """

    trained: Trained
    given: InitFromSpec
    step: int = 0


def find_inputs(spec: JobSpec, where: Callable[[str], str]) -> tuple[dict[str, Trained], list[Problem]]:
    """The models that a job names as its inputs, and what is wrong with them."""
    found, problems = {}, []
    for name, reference in spec.inputs.items():
        try:
            found[name] = find_model(reference)
        except InputError as error:
            problems += [Problem(where(f"inputs.{name}"), one.found, one.expected, one.fix) for one in error.problems]
        except CheckpointError as error:
            problems.append(_damaged(where(f"inputs.{name}"), reference, error))
    return found, problems


def find_start(spec: JobSpec, planned: Plan, taken: Manifest, where: Callable[[str], str]) -> Start:
    """What a job that says `init_from` begins with.

    Raises:
        InputError: there is no such model, or the job cannot go on where that run stands.
    """
    given, at = spec.init_from, where("init_from.model")
    assert given is not None
    try:
        if given.take == "weights":
            return Start(find_model(given.model), given)
        trained = _as_it_stands(given.model, given.step)
        position = read_state(trained.weights.parent, "position")["position"]
        recorded = from_record(read_record(trained.records / "data_manifest.json"))
    except InputError as error:
        raise InputError([Problem(at, one.found, one.expected, one.fix) for one in error.problems]) from error
    except CheckpointError as error:
        raise InputError([_damaged(at, given.model, error)]) from error
    if problems := _cannot_go_on(spec, planned, recorded.splits[TRAIN] == taken.splits[TRAIN], trained, position, where):
        raise InputError(problems)
    return Start(trained, given, job_order(spec, planned, taken).step(position))


def _damaged(at: str, reference: str, error: CheckpointError) -> Problem:
    return Problem(at, f"{reference}: {error}", "a model whose files are as they were", "Restore it, or name another.")


def _as_it_stands(run_id: str, step: int | None) -> Trained:
    """The model of a run as its last checkpoint has it, or that of a step."""
    folder = find_run(run_id)
    if step is not None:
        there = sorted(folder.checkpoints.glob(f"step-{step:08d}.*"), key=lambda path: int(path.suffix[1:]))
        if not there:
            kept = sorted(path.name for path in folder.checkpoints.glob("step-*"))
            fix = "Name one that is kept, or leave out `step`."
            raise InputError([Problem("run", f"run {run_id}, which keeps {kept}", f"a checkpoint of step {step}", fix)])
        return at_checkpoint(folder, there[-1])
    name = find_latest(folder.checkpoints, lambda passed_over: None)
    if name is None:
        raise InputError([Problem("run", f"run {run_id}, which has no checkpoint", "one that has saved", "Name another run.")])
    return at_checkpoint(folder, folder.checkpoints / name)


def _cannot_go_on(
    spec: JobSpec, planned: Plan, same_rows: bool, trained: Trained, position: int, where: Callable[[str], str]
) -> list[Problem]:
    """Why a job cannot go on behind the step in which another run stands: it would train on some rows twice, or on none."""
    at, fix = where("init_from.model"), "Write `take: weights`, to begin with its weights at the first step."
    rows, problems = planned.train_rows, []
    if not same_rows:
        problems.append(Problem(at, "a run that trained on other rows", "one with the training rows of this job", fix))
    in_epoch = {
        "loop.seed": (trained.spec.loop.seed, spec.loop.seed),
        "loop.global_batch_rows": (trained.plan.global_batch_rows, planned.global_batch_rows),
        "loop.window_rows": (trained.plan.window_rows, planned.window_rows),
    }
    for name, (then, now) in in_epoch.items():
        if position % rows and then != now:
            found = f"{now}, and a run that stands {position % rows} rows into an epoch with {then}"
            problems.append(Problem(where(name), found, f"{then} until that epoch is over", fix))
    if position >= planned.total_rows:
        found = f"a run that has trained on {position} rows, and a job of {planned.total_rows}"
        problems.append(Problem(at, found, "a job that is longer", f"Raise loop.epochs or loop.steps. {fix}"))
    of_run, of_job = ([(name, one.kind, one.parameters) for name, one in each.optimizers()] for each in (trained.spec, spec))
    if of_run != of_job:
        problems.append(Problem(where("optimizer"), f"{of_job}", f"the optimizers whose state that run has: {of_run}", fix))
    return problems


# ---------------------------------------------------------------- the run begins


def lay_down(folder: RunFolder, start: Start) -> None:
    """Make what a run begins with its first checkpoint."""
    begun = _state(start)
    source = start.trained.weights.parent
    copied = [WEIGHTS] if start.given.take == "weights" else [WEIGHTS, OPTIMIZER]
    writers = {name: partial(shutil.copyfile, source / name) for name in copied}
    content = Content(
        begun["step"],
        {OPTIMIZER: _write_no_tensors, **writers, RECORD: lambda path: path.write_text(json.dumps(begun, indent=1))},
    )
    commit(folder.checkpoints, ATTEMPT, 1, content, best=False)


def _write_no_tensors(path: Path) -> None:
    # A file of safetensors: the length of its header in eight bytes, then the header.
    path.write_bytes((2).to_bytes(8, "little") + b"{}")


def _state(start: Start) -> dict[str, Any]:
    if start.given.take == "weights":
        counts = dict.fromkeys(("position", "step", "rows_used", "rows_skipped", "num_averaged"), 0)
        without: dict[str, Any] = {"optimizer_groups": {}, "optimizer_numbers": {}, "schedules": {}}
        return {**NEW, **counts, **without, "evaluated": True, "weights_sha256": start.trained.weights_sha256}
    state = {**read_state(start.trained.weights.parent), **NEW, "step": start.step}
    # Where these are absent, they are as the job makes them.
    return state | ({"optimizer_groups": {}, "schedules": {}, "loss_scales": {}} if start.given.hyperparameters == "job" else {})
