"""What of a model version goes to MLflow: its files, and the exported graph where there is one. Nothing of it is a pickle.

With a graph, the version is a model of MLflow's PyTorch flavor, which MLflow loads without raymill and without the job's code.
Without one, it has the flavor "raymill" alone: MLflow keeps it, and says that it cannot load it; raymill does.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raymill.checkpoint.directory import file_sha256
from raymill.errors import CheckpointError
from raymill.models import exported
from raymill.own_code import export

if TYPE_CHECKING:
    import torch
    from mlflow.entities import LoggedModel
    from mlflow.models import Model, ModelSignature

FILES = "extra_files"
"""MLflow's name for the folder of what is kept beside a model."""


@dataclass
class Artifact:
    """A version's files; in MLflow's words a flavor, which can save itself into a folder.

    Attributes:
        model: in eval mode.
        inputs: an example for its forward pass; None: it is not exported.
        files: what lies beside the graph.
        sha256: of the graph's archive, once it is saved; "": there is none.
        not_exported: why there is no graph; "" where there is one.
    """

    model: torch.nn.Module
    inputs: tuple[torch.Tensor, ...] | None
    files: Sequence[Path]
    not_exported: str
    sha256: str = field(default="", init=False)

    def log(self, logged: LoggedModel, step: int) -> None:
        """Export and upload.

        Raises:
            CheckpointError: the graph that MLflow keeps is another one.
        """
        from mlflow.models import Model

        # `mlflow.pytorch.log_model` without its active run: that belongs to whoever runs this process.
        Model.log(
            None,
            self,
            name=logged.name,
            run_id=logged.source_run_id,
            model_id=logged.model_id,
            # MLflow gives the model the run's metrics of this step: points that the run has already, so none is doubled.
            step=step,
        )
        if self.sha256:
            _look_at_stored(logged, self.sha256)

    def save_model(self, path: str, mlflow_model: Model) -> None:
        """Save into a folder that is not there yet, as MLflow asks a flavor to."""
        folder = Path(path)
        if self.inputs is not None and not self.not_exported:
            self.not_exported = self._export(folder, mlflow_model, self.inputs)
        if self.not_exported:
            shutil.rmtree(folder, ignore_errors=True)
            self._save_files(folder, mlflow_model)

    def _export(self, folder: Path, mlflow_model: Model, inputs: tuple[torch.Tensor, ...]) -> str:
        """Save with the graph; returns why that is not possible, or ""."""
        import mlflow

        try:
            arrays = tuple(value.numpy() for value in inputs)
            with export.without_pages():
                mlflow.pytorch.save_model(
                    self.model,
                    str(folder),
                    mlflow_model=mlflow_model,
                    input_example=arrays[0] if len(arrays) == 1 else arrays,
                    signature=_signature(self.model, inputs),
                    serialization_format="pt2",
                    pip_requirements=_requirements(),
                    extra_files=[str(file) for file in self.files],
                )
            archive = folder / exported.FILE
            exported.drop_example_inputs(archive)
            self.sha256 = file_sha256(archive)
            found = export.difference(self.model, exported.load_exported(archive, self.sha256), inputs)
        except OSError:
            raise  # a full disk is no fault of the model
        except Exception as error:  # torch.export runs the job's own code and may raise anything
            found = export.reason(error)
        if found:
            self.sha256 = ""
        return found

    def _save_files(self, folder: Path, mlflow_model: Model) -> None:
        beside = folder / FILES
        beside.mkdir(parents=True)
        for file in self.files:
            if file.is_dir():
                shutil.copytree(file, beside / file.name)
            else:
                shutil.copyfile(file, beside / file.name)
        (folder / "requirements.txt").write_text("\n".join(_requirements()) + "\n")
        # What an export that failed has left there.
        mlflow_model.flavors, mlflow_model.signature, mlflow_model.saved_input_example_info = {}, None, None  # type: ignore[assignment]
        mlflow_model.add_flavor("raymill", files=FILES)
        mlflow_model.save(str(folder / "MLmodel"))


def _requirements() -> list[str]:
    import mlflow
    import torch

    return [f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}", f"mlflow=={mlflow.__version__}"]


def _look_at_stored(logged: LoggedModel, sha256: str) -> None:
    """Hold the graph as the store has it against what was sent there."""
    import tempfile

    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as stored:
        archive = Path(download_artifacts(f"models:/{logged.model_id}", dst_path=stored)) / exported.FILE
        if (found := file_sha256(archive)) != sha256:
            raise CheckpointError(f"{logged.artifact_location}: MLflow keeps a graph of SHA-256 {found}, but was given {sha256}")


def _signature(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> ModelSignature:
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def spec(value: torch.Tensor, name: str | None) -> TensorSpec:
        return TensorSpec(value.numpy().dtype, (-1, *value.shape[1:]), name)

    with torch.no_grad():
        output = model(*inputs)
    names = [None] if len(inputs) == 1 else [f"input_{number}" for number in range(len(inputs))]
    taken = Schema([spec(value, name) for value, name in zip(inputs, names, strict=True)])
    return ModelSignature(taken, Schema([spec(output, None)]) if isinstance(output, torch.Tensor) else None)
