"""Measure a model that was trained before: on its job's validation rows, every row once, in this process.

The rows come in the run's own batches and shards and are measured by the loop's own code, so a checkpoint gives the
numbers that its run recorded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from raymill import checkpoint, load, loop, plan, registry
from raymill.collate import as_batch
from raymill.desk import NearDesk
from raymill.errors import CheckpointError, InputError, Problem
from raymill.home import RunFolder, run_folder
from raymill.manifest import take_manifest
from raymill.metrics import Evaluation
from raymill.order import VALIDATION, Item, num_batches
from raymill.parallel import gather
from raymill.plan import Plan
from raymill.spec import NAME, JobSpec
from raymill.stream import Feed, Reader


@dataclass(frozen=True)
class Trained:
    """A model that was trained, on disk.

    Attributes:
        name: "name/version", or the run's id for the best checkpoint of a run.
        run_id: the run that trained it.
        weights: its safetensors file.
        spec: its job.
        plan: the numbers that it was trained by.
    """

    name: str
    run_id: str
    weights: Path
    spec: JobSpec
    plan: Plan


def evaluate(reference: str) -> dict[str, Any]:
    """Measure a model on the validation rows as they are now.

    Args:
        reference: name@alias, name/version, or the id of a run, which means its best checkpoint.

    Returns:
        model, run_id, rows, metrics (name -> mean over all rows) and totals (name -> nested lists).

    Raises:
        InputError: when there is no such model, or its job has no validation rows.
        CheckpointError: when the run's checkpoint is damaged, or is of another model than the task builds now.
        DataError: when the rows cannot be read.
    """
    trained = find_model(reference)
    values, totals, num_rows = measure_all(trained)
    return {
        "model": trained.name,
        "run_id": trained.run_id,
        "rows": num_rows,
        "metrics": {f"{VALIDATION}/{name}": value for name, value in values.items()},
        "totals": {f"{VALIDATION}/{name}": total for name, total in totals.items()},
    }


def find_model(reference: str) -> Trained:
    """The files of a model.

    Raises:
        InputError: when there is no such model, or the run has no checkpoint yet.
        CheckpointError: when its files are damaged, or of another version of raymill.
        TrackingError: when the registry cannot be reached.
    """
    folder = run_folder(reference)
    if NAME.fullmatch(reference) and folder.spec.is_file():
        chosen = _best_checkpoint(folder)
        checkpoint.verify(chosen)
        return _trained(reference, reference, chosen, folder.path)
    version = registry.resolve(reference)
    files = registry.model_files(version)
    return _trained(f"{version.name}/{version.version}", version.run_id, files, files)


def _best_checkpoint(folder: RunFolder) -> Path:
    pointer = checkpoint.read_pointer(folder.checkpoints)
    if pointer is None:
        fix = f"Go on with it: --resume {folder.run_id}"
        raise InputError([Problem(f"run {folder.run_id}", "no checkpoint", "at least one", fix)])
    return folder.checkpoints / (pointer.best or pointer.latest)


def _trained(name: str, run_id: str, weights: Path, records: Path) -> Trained:
    try:
        spec = JobSpec.model_validate_json((records / "spec.json").read_text())
        planned = Plan(**json.loads((records / "plan.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{records}: the job or the plan of {name} cannot be read: {error}. It is damaged, or of another version of "
            "raymill. Train it again."
        ) from error
    return Trained(name, run_id, weights / "weights.safetensors", spec, planned)


def measure_all(trained: Trained) -> tuple[dict[str, float], dict[str, Any], int]:
    """Read, transform and measure every validation row once; see `Evaluation.reduce` for what is returned."""
    spec = trained.spec
    pipeline = load.import_pipeline(spec)
    taken = take_manifest(pipeline, lenient=spec.bad_rows.lenient)
    if VALIDATION not in taken.splits:
        fix = "Give the pipeline a validation source."
        raise InputError([Problem(spec.pipeline, f"splits {sorted(taken.splits)}", f"a split {VALIDATION!r}", fix)])
    rows = {split: part.num_rows for split, part in taken.splits.items()}
    planned = replace(
        trained.plan,
        train_rows=rows["train"],
        validation_rows=rows[VALIDATION],
        validation_windows=max(1, trained.plan.validation_windows),
    )
    # The shards of the run's workers, all in this process: pieces of other sizes would be rounded otherwise.
    cut = plan.cut(planned, VALIDATION, world_size=1)
    order = plan.job_order(spec, planned, taken)
    job = loop.Job(
        spec=spec,
        plan=planned,
        order=order,
        cuts={VALIDATION: cut},
        task=load.import_task(spec, pipeline.schema),
        collate=pipeline.collate or as_batch,
    )
    fragments = {split: part.fragments for split, part in taken.splits.items()}
    reader = Reader(trained.name, order, job.cuts, fragments, pipeline, spec.bad_rows.lenient)
    windows = (Item(VALIDATION, 0, window, 0) for window in range(planned.validation_windows))
    feed = Feed(reader.read(item)[0] for item in windows)

    on_gpu = spec.scale.gpus_per_worker and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    seat = loop.Seat(rank=0, world_size=1, device=device, desk=NearDesk(RunFolder(trained.weights.parent)), attempt=0)
    torch.set_num_threads(planned.threads)
    model = job.task.build()
    try:
        model.load_state_dict(load_file(trained.weights), strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{trained.weights} does not fit what {spec.task} builds now: {error}. Restore the task's code as it was."
        ) from error
    model.to(device)
    evaluation = Evaluation()
    for number in range(num_batches(cut.num_rows, cut.batch_rows)):
        loop.measure(job, seat, model, feed, 0, number, evaluation)
    feed.finish(VALIDATION, 0, planned.validation_windows)
    return evaluation.reduce(gather)
