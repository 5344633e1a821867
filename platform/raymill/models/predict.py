"""What a trained model says of new rows, in this process: the pipeline's transform and collate, then the task's `predict`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from raymill.data.arrow import schema_of, schema_problems
from raymill.data.rows import join, take
from raymill.data.seeds import unchanged_generators
from raymill.errors import InputError, Problem
from raymill.models.find import find_model
from raymill.own_code import contracts
from raymill.task import Pipeline, Rows, Schema, Task
from raymill.trained.model import Trained
from raymill.training.batch import asked_schema, prediction_batch, to_device


@dataclass(frozen=True)
class Predictor:
    """A model, ready for rows.

    Attributes:
        trained: its files.
        pipeline: its data, for the schema, the transform and collate.
        task: the user's Task.
        model: in eval mode.
        device: where it is: a GPU if it was trained on one and there is one, else the CPU.
    """

    trained: Trained
    pipeline: Pipeline
    task: Task
    model: torch.nn.Module
    device: torch.device

    @classmethod
    def load(cls, reference: str) -> Predictor:
        """Of `name@alias`, `name/version` or a run's id.

        Raises:
            InputError, CheckpointError, TrackingError: see `find_model`.
        """
        trained = find_model(reference)
        pipeline = trained.pipeline()
        task = trained.task(pipeline)
        on_gpu = trained.spec.scale.gpus_per_worker and torch.cuda.is_available()
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        return cls(trained, pipeline, task, contracts.to_device(task, trained.build(task), device), device)

    @property
    def takes(self) -> Schema:
        """The columns of a question."""
        return asked_schema(self.pipeline)

    @property
    def may_lack(self) -> frozenset[str]:
        """Those of them that may be left out: labels, where the pipeline does not say which columns are targets."""
        labels = {name for name, field in self.takes.items() if field.classes is not None and None not in field.shape}
        return frozenset(labels if self.pipeline.targets is None else ())

    @property
    def batch_rows(self) -> int:
        """Rows that are asked about at once: what a worker took in one pass when the model was trained."""
        plan = self.trained.plan
        return -(-plan.global_batch_rows // (plan.strict_shards or plan.num_workers * plan.shards_per_worker))

    def predict(self, rows: Rows) -> Rows:
        """What the model says of these rows, in their order; see `Task.predict`.

        Raises:
            InputError: the rows do not fit the pipeline's schema, or what the task says of them is no value for each.
        """
        count = len(next(iter(rows.values()), ()))
        if not count:
            raise InputError([Problem("rows", "none", "at least one row", "Give every column as many values as there are rows.")])
        # Before they are cut, which would hide that one is longer than another.
        rows = self._completed(rows)
        # Copies, since a transform may work in place.
        places = np.split(np.arange(count), range(self.batch_rows, count, self.batch_rows))
        return join(list(self.predict_each(take(rows, some) for some in places)))

    def predict_each(self, batches: Iterable[Rows]) -> Iterator[Rows]:
        """The same for rows that come in batches, batch by batch.

        Raises:
            InputError: as `predict`, or a batch's answer is of another schema than the first one's.
        """
        gives: Schema | None = None
        for rows in batches:
            answer = self._answer(self._completed(rows))
            gives = gives or schema_of(answer)
            if problems := schema_problems(answer, gives, "predict(model, batch)"):
                raise InputError(problems)
            yield answer

    def _completed(self, rows: Rows) -> Rows:
        """The rows, held against the schema, with zeros for labels that were left out."""
        count = len(next(iter(rows.values())))
        filled = dict(rows)
        for name in self.may_lack - rows.keys():
            field = self.takes[name]
            filled[name] = np.zeros((count, *(extent or 0 for extent in field.shape)), field.dtype)
        if problems := schema_problems(filled, self.takes, "rows"):
            raise InputError(problems)
        return filled

    def _answer(self, rows: Rows) -> Rows:
        with unchanged_generators():
            batch = to_device(prediction_batch(self.pipeline, rows), self.device)
            return contracts.predict(self.task, self.model, batch, len(next(iter(rows.values()))))
