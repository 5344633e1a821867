"""Measure a model that was trained before: on its job's validation rows, every row once, in this process.

The rows come in the run's own batches and shards and are measured by the loop's own code, so a checkpoint gives the
numbers that its run recorded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from raymill.config import load
from raymill.data.feed import Feed
from raymill.data.manifest import take_manifest
from raymill.data.order import Item, num_batches
from raymill.data.seeds import unchanged_caller
from raymill.errors import InputError, Problem
from raymill.evaluation.sums import Evaluation
from raymill.models.trained import Trained, find_model
from raymill.parallel.process_group import all_gather
from raymill.record.folder import RunFolder
from raymill.record.store import LocalRunStore
from raymill.task import TRAIN, VALIDATION
from raymill.training.assembly import WorkerContext, assemble
from raymill.training.evaluation_pass import evaluate_batch


def evaluate(reference: str) -> dict[str, Any]:
    """Measure a model on the validation rows as they are now.

    Args:
        reference: name@alias, name/version, or the id of a run, which means its best checkpoint.

    Returns:
        model, run_id, rows, metrics (name -> mean over all rows), totals (name -> nested lists), and code_changed: how today's
        code, which measures, differs from the code that trained the model (see `FileChange`); None: that code is not known.

    Raises:
        InputError: when there is no such model, or its job has no validation rows.
        CheckpointError: when its files are damaged, were changed, or are of another model than the task builds now.
        DataError: when the rows cannot be read.
    """
    trained = find_model(reference)
    changed = trained.code_changes()
    values, totals, num_rows = evaluate_all(trained)
    return {
        "model": trained.name,
        "run_id": trained.run_id,
        "rows": num_rows,
        "metrics": {f"{VALIDATION}/{name}": value for name, value in values.items()},
        "totals": {f"{VALIDATION}/{name}": total for name, total in totals.items()},
        "code_changed": None if changed is None else [change.model_dump() for change in changed],
    }


def evaluate_all(trained: Trained) -> tuple[dict[str, float], dict[str, Any], int]:
    """Read, transform and measure every validation row once; see `Evaluation.reduce` for what is returned."""
    spec = trained.spec
    pipeline = load.import_pipeline(spec)
    taken = take_manifest(pipeline, lenient=spec.bad_rows.lenient)
    if VALIDATION not in taken.splits:
        fix = "Give the pipeline a validation source."
        raise InputError([Problem(spec.pipeline, f"splits {sorted(taken.splits)}", f"a split {VALIDATION!r}", fix)])
    planned = replace(
        trained.plan,
        train_rows=taken.splits[TRAIN].num_rows,
        validation_rows=taken.splits[VALIDATION].num_rows,
        validation_windows=max(1, trained.plan.validation_windows),
    )
    # The shards of the run's workers, all in this process: microbatches of other sizes would be rounded otherwise.
    job = assemble(spec, planned, taken, pipeline, world_size=1)
    reader, sharding = job.reader(trained.name), job.shardings[VALIDATION]
    windows = (Item(VALIDATION, 0, window, 0) for window in range(planned.validation_windows))
    feed = Feed(reader.read(item)[0] for item in windows)

    on_gpu = spec.scale.gpus_per_worker and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    store = LocalRunStore(RunFolder(trained.weights.parent))
    context = WorkerContext(rank=0, world_size=1, device=device, store=store)
    evaluation = Evaluation()
    with unchanged_caller():
        torch.set_num_threads(planned.threads)
        model = trained.build(job.task).to(device)
        for number in range(num_batches(sharding.num_rows, sharding.batch_rows)):
            evaluate_batch(job, context, model, feed, 0, number, evaluation)
    feed.finish(VALIDATION, 0, planned.validation_windows)
    return evaluation.reduce(all_gather)
