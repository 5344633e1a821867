"""What a trained model says of new rows, in this process: the pipeline's transform, the task's inputs, `forward`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raymill.config import load
from raymill.data.arrow import schema_problems
from raymill.data.rows import ROW_ID, num_rows
from raymill.errors import InputError, Problem
from raymill.models.trained import Trained, find_model
from raymill.own_code import contracts
from raymill.task import VALIDATION, Pipeline, Rows, Task
from raymill.training.batch import default_collate


@dataclass(frozen=True)
class Predictor:
    """A model, ready for rows.

    Attributes:
        trained: its files.
        pipeline: its data, for the schema, the transform and collate.
        task: the user's Task.
        model: in eval mode, on the CPU.
    """

    trained: Trained
    pipeline: Pipeline
    task: Task
    model: torch.nn.Module

    @classmethod
    def load(cls, reference: str) -> Predictor:
        """Of `name@alias`, `name/version` or a run's id.

        Raises:
            InputError, CheckpointError, TrackingError: see `find_model`.
        """
        trained = find_model(reference)
        if changed := trained.code_changes():
            what = ", ".join(map(str, changed))
            warnings.warn(f"{reference} was trained with other code than today's, which runs now: {what}", stacklevel=3)
        pipeline = load.import_pipeline(trained.spec)
        task = load.import_task(trained.spec, pipeline.schema)
        return cls(trained, pipeline, task, trained.build(task))

    def predict(self, rows: Rows) -> Any:
        """What the task's `predict` says of these rows, or else what `forward` returns, in their order, with arrays for tensors.

        Rows are transformed as those of the validation split. A column that is missing is filled with zeros if it is a label (the
        schema says `classes`), since a model that is asked does not need the answer.

        Raises:
            InputError: the rows do not fit the pipeline's schema.
        """
        count = num_rows(rows)
        if not count:
            raise InputError([Problem("rows", "none", "at least one row", "Give every column as many values as there are rows.")])
        filled = dict(rows)
        for name, field in self.pipeline.schema.items():
            if name not in filled and field.classes is not None and None not in field.shape:
                filled[name] = np.zeros((count, *(extent or 0 for extent in field.shape)), field.dtype)
        if problems := schema_problems(filled, self.pipeline.schema, "rows"):
            raise InputError(problems)
        changed = dict(self.pipeline.transform(filled, VALIDATION, np.random.default_rng(0)))
        changed[ROW_ID] = np.arange(count)
        batch = (self.pipeline.collate or default_collate)(changed)
        with torch.no_grad():
            predicted = contracts.predict(self.task, self.model, batch, count)
            return _as_arrays(self.model(*contracts.inputs(self.task, batch)) if predicted is None else predicted)


def _as_arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {name: _as_arrays(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_arrays(item) for item in value]
    return value
