"""The weights of a run or of a registered version, with the job that trained them; verified at every load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from raymill.checkpoint.directory import WEIGHTS, read_pointer, read_state, verify
from raymill.config import load
from raymill.config.job_code import code_of
from raymill.config.plan import Plan
from raymill.config.spec import JobSpec
from raymill.errors import CheckpointError, InputError, Problem
from raymill.files import read_record
from raymill.models import registry
from raymill.record import fitted as record_fitted
from raymill.record import kept_code
from raymill.record.folder import RunFolder, is_run_id, run_folder
from raymill.task import Pipeline, Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Trained:
    """A model that was trained, on disk.

    Attributes:
        name: "name/version", or the run's id for the best checkpoint of a run.
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

    def code_changes(self) -> list[kept_code.FileChange] | None:
        """How today's code, which is what runs, differs from the code that trained it; None: that code is not known.

        Raises:
            CheckpointError: what is kept of it is damaged.
        """
        record = kept_code.read(self.records)
        return None if record is None else kept_code.changes_since(self.records, record, code_of(self.spec))

    @cached_property
    def fitted(self) -> Mapping[str, bytes]:
        """What was fitted for it.

        Raises:
            CheckpointError: it is damaged.
        """
        return record_fitted.read(self.records)

    def pipeline(self) -> Pipeline:
        """The data of its job, with what was fitted for it."""
        return load.import_pipeline(self.spec, self.fitted)

    def task(self, pipeline: Pipeline) -> Task:
        """Its task, for this pipeline's schema and with what was fitted."""
        return load.import_task(self.spec, pipeline.schema, self.fitted)

    def load_weights(self) -> Mapping[str, torch.Tensor]:
        """The weights, on the CPU.

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


_AGAIN = "Restore it, or train the model again."


def find_model(reference: str) -> Trained:
    """The files of a model, verified.

    Args:
        reference: name@alias, name/version, or the id of a run, which means its best checkpoint.

    Raises:
        InputError: when there is no such model, the run has no checkpoint yet, or its files are of another version of raymill.
        CheckpointError: when its files are damaged or were changed.
        TrackingError: when the registry cannot be reached.
    """
    if is_run_id(reference) and (folder := run_folder(reference)).spec.is_file():
        chosen = _best_checkpoint(folder)
        verify(chosen)
        return _trained(reference, reference, chosen, read_state(chosen, "weights_sha256")["weights_sha256"], folder.path)
    version = registry.resolve(reference)
    files = registry.model_files(version)
    verify(files, registry.VERSION_FILES, may_have=(registry.SIGNATURE, record_fitted.FILE))
    return _trained(f"{version.name}/{version.version}", version.run_id, files, version.weights_sha256, files)


def _best_checkpoint(folder: RunFolder) -> Path:
    pointer = read_pointer(folder.checkpoints)
    if pointer is None:
        fix = f"Go on with it: --resume {folder.run_id}"
        raise InputError([Problem(f"run {folder.run_id}", "no checkpoint", "at least one", fix)])
    return folder.checkpoints / (pointer.best or pointer.latest)


def _trained(name: str, run_id: str, weights: Path, weights_sha256: str, records: Path) -> Trained:
    try:
        spec = JobSpec.model_validate(read_record(records / "spec.json"))
        planned = Plan.from_record(read_record(records / "plan.json"))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{records}: the job or the plan of {name} cannot be read: {error}. {_AGAIN}") from error
    return Trained(name, run_id, weights / WEIGHTS, weights_sha256, spec, planned, records)
