"""Measure a model that was trained before: on a split of its job's rows, every row once, in this process.

The rows come in the run's own batches and shards and are measured by the loop's own code, so a checkpoint gives the
numbers that its run recorded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from raymill.config.spec import EvaluationSpec
from raymill.data.feed import Feed
from raymill.data.manifest import take_manifest
from raymill.data.order import Item, num_batches
from raymill.data.seeds import unchanged_caller
from raymill.errors import InputError, Problem, did_you_mean
from raymill.evaluation.sums import Evaluation, as_numbers
from raymill.models.find import find_model
from raymill.own_code import contracts
from raymill.record.folder import RunFolder
from raymill.record.store import LocalRunStore
from raymill.task import TRAIN, VALIDATION
from raymill.trained.model import Trained
from raymill.training.assembly import WorkerContext, assemble
from raymill.training.evaluation_pass import Concluded, concluded, evaluate_batch


def evaluate(reference: str, split: str = VALIDATION) -> dict[str, Any]:
    """Measure a model on the rows of a split as they are now.

    Args:
        reference: name@alias, name/version, or the id of a run, which means its best checkpoint.
        split: of its job's pipeline; all rows of it are measured.

    Returns:
        model, run_id, split, rows, metrics (name -> number), totals (name -> nested lists), and code_changed: how today's
        code, which measures, differs from the code that trained the model (see `FileChange`); None: that code is not known.

    Raises:
        InputError: when there is no such model, or its job has no such split.
        CheckpointError: when its files are damaged, were changed, or are of another model than the task builds now.
        DataError: when the rows cannot be read.
    """
    trained = find_model(reference)
    changed = trained.code_changes()
    found = evaluate_all(trained, split)
    return {
        "model": trained.name,
        "run_id": trained.run_id,
        "split": split,
        "rows": found.num_rows,
        "metrics": {f"{split}/{name}": value for name, value in found.metrics.items()},
        "totals": {f"{split}/{name}": as_numbers(total) for name, total in found.totals.items()},
        "code_changed": None if changed is None else [change.model_dump() for change in changed],
    }


def evaluate_all(trained: Trained, split: str = VALIDATION) -> Concluded:
    """Read, transform and measure every row of a split once."""
    spec = trained.spec.model_copy(update={"evaluate": [EvaluationSpec(split=split)]})
    pipeline = trained.pipeline()
    taken = take_manifest(pipeline, lenient=spec.bad_rows.lenient)
    if split not in taken.splits:
        fix = did_you_mean(split, taken.splits)
        raise InputError([Problem(spec.pipeline, f"splits {sorted(taken.splits)}", f"a split {split!r}", fix)])
    planned = replace(trained.plan, train_rows=taken.splits[TRAIN].num_rows)
    # The shards of the run's workers, all in this process: microbatches of other sizes would be rounded otherwise.
    job = assemble(spec, planned, taken, pipeline, world_size=1, fitted=trained.fitted, inputs=trained.inputs)
    reader, sharding = job.reader(trained.name), job.shardings[split]
    num_windows = job.order.evaluation(split).num_windows
    feed = Feed(packet for window in range(num_windows) for packet in reader.read(Item(split, 0, window, 0)))

    on_gpu = spec.scale.gpus_per_worker and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    store = LocalRunStore(RunFolder(trained.weights.parent))
    context = WorkerContext(rank=0, world_size=1, device=device, store=store)
    evaluation = Evaluation()
    with unchanged_caller():
        torch.set_num_threads(planned.threads)
        model = contracts.to_device(job.task, trained.build(job.task), device)
        for number in range(num_batches(sharding.num_rows, sharding.batch_rows)):
            evaluate_batch(job, context, model, feed, split, 0, number, evaluation)
        feed.finish(split, 0, num_windows)
        return concluded(job, evaluation)
