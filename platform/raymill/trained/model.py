"""The weights of a run or of a registered version, with the job that trained them; verified at every load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from raymill.checkpoint.directory import WEIGHTS, verify
from raymill.config import load
from raymill.config.job_code import code_of
from raymill.config.plan import Plan
from raymill.config.spec import JobSpec
from raymill.data.seeds import unchanged_generators
from raymill.errors import CheckpointError
from raymill.files import read_record
from raymill.record import fitted as record_fitted
from raymill.record import inputs as record_inputs
from raymill.record import kept_code
from raymill.task import Pipeline, Task

if TYPE_CHECKING:
    import torch

VERSION_FILES = (WEIGHTS, "spec.json", "plan.json", "data_manifest.json")
"""What a folder of a trained model holds, such as a registered version; all of it is named in its `checksums.json`."""

SIGNATURE = "signature.json"
"""Likewise, in versions since raymill knows what a model takes and gives: name -> dtype and shape of one row's value."""

MAY_HAVE = (SIGNATURE, record_fitted.FILE, record_inputs.FILE)
"""What is there only where it is needed."""


@dataclass(frozen=True)
class Trained:
    """A model that was trained, on disk.

    Attributes:
        name: "name/version", or the run's id for a checkpoint of a run.
        run_id: the run that trained it.
        weights: its safetensors file.
        weights_sha256: what the weights must hash to, as a checkpoint or the registry says.
        spec: its job.
        plan: the numbers that it was trained by.
        records: the folder that says so, and that keeps the job's code.
    """

    name: str
    run_id: str
    weights: Path
    weights_sha256: str
    spec: JobSpec
    plan: Plan
    records: Path

    @cached_property
    def fitted(self) -> Mapping[str, bytes]:
        """What was fitted for it.

        Raises:
            CheckpointError: it is damaged.
        """
        return record_fitted.read(self.records)

    @cached_property
    def inputs(self) -> Mapping[str, Trained]:
        """The models that its own job was given.

        Raises:
            CheckpointError: one of them is damaged, or was changed.
        """
        return read_inputs(self.records)

    def code_changes(self) -> list[kept_code.FileChange] | None:
        """How today's code, which is what runs, differs from the code that trained it; None: that code is not known.

        Raises:
            CheckpointError: what is kept of it is damaged.
        """
        record = kept_code.read(self.records)
        now = code_of(self.spec, *(one.spec for one in self.inputs.values()))
        return None if record is None else kept_code.changes_since(self.records, record, now)

    def pipeline(self) -> Pipeline:
        """The data of its job, with what was fitted for it."""
        return load.import_pipeline(self.spec, self.fitted)

    def task(self, pipeline: Pipeline) -> Task:
        """Its task, for this pipeline's schema, with what was fitted and the models that it was given."""
        return load.import_task(self.spec, pipeline.schema, self.fitted, self.inputs)

    def load_weights(self) -> Mapping[str, torch.Tensor]:
        """The weights and buffers by their names in the model, on the CPU.

        Raises:
            CheckpointError: they are not those that were trained.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from raymill.checkpoint.snapshot import weights_sha256

        try:
            weights = load_file(self.weights)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.weights}: cannot be read: {error}. {_AGAIN}") from error
        if (found := weights_sha256(weights)) != self.weights_sha256:
            raise CheckpointError(
                f"{self.weights}: the weights of {self.name} have SHA-256 {found}, but {self.weights_sha256} were trained: the "
                f"file was changed or damaged. {_AGAIN}"
            )
        return weights

    def build(self, task: Task) -> torch.nn.Module:
        """The model with its weights, on the CPU, in eval mode.

        Raises:
            CheckpointError: the weights are not those that were trained, or the task builds another model now.
        """
        model = task.build()
        try:
            model.load_state_dict(self.load_weights(), strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.weights} does not fit what {self.spec.task} builds now: {error}. Restore the task's code as it was."
            ) from error
        return model.eval()

    def load_model(self) -> torch.nn.Module:
        """The model as it was trained, frozen: on the CPU, in eval mode, no parameter asks for a gradient.

        Raises:
            CheckpointError: its files are damaged or were changed, or its task builds another model now.
        """
        with unchanged_generators():
            return self.build(self.task(self.pipeline())).requires_grad_(False)


_AGAIN = "Restore it, or train the model again."


def from_records(name: str, run_id: str, weights: Path, weights_sha256: str, records: Path) -> Trained:
    """A model, with its job as the records in a folder say it.

    Args:
        weights: the folder that holds them.

    Raises:
        CheckpointError: the records cannot be read.
    """
    try:
        spec = JobSpec.model_validate(read_record(records / "spec.json"))
        planned = Plan.from_record(read_record(records / "plan.json"))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{records}: the job or the plan of {name} cannot be read: {error}. {_AGAIN}") from error
    return Trained(name, run_id, weights / WEIGHTS, weights_sha256, spec, planned, records)


def read_inputs(records: Path) -> dict[str, Trained]:
    """The models that a job was given, from its run's folder or a folder of `files.lay_out`.

    Raises:
        CheckpointError: one of them is not whole, or was changed.
    """
    found = {}
    for name, pinned in record_inputs.read(records).items():
        folder = record_inputs.place(records, name)
        verify(folder, VERSION_FILES, MAY_HAVE)
        found[name] = from_records(pinned.model, pinned.run_id, folder, pinned.weights_sha256, folder)
    return found
