"""A finished run's best weights become a version of a registered model.

A version holds the exported graph (pt2, batch size free) where torch can export it, and beside it what is needed to train on
or to rebuild the model: weights, spec, plan and data manifest, with the checksums of all four. Nothing in it is a pickle.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raymill.checkpoint.directory import WEIGHTS, file_sha256, read_state, verify, write_checksums
from raymill.config.job_code import code_of
from raymill.config.load import import_pipeline, import_task
from raymill.config.spec import JobSpec
from raymill.data.bad_rows import read_good_rows
from raymill.data.rows import ROW_ID, join, num_rows, take
from raymill.errors import CheckpointError, InputError, Problem, RunError
from raymill.files import read_record, write_record
from raymill.models import exported
from raymill.models.registry import CODE_TAG, DATA_TAG, MODEL_TAG, NOT_EXPORTED_TAG, WEIGHTS_TAG, metric_tags
from raymill.record import kept_code
from raymill.record.catalog import data_digest
from raymill.record.events import RunFinished, read_events
from raymill.record.folder import RunFolder
from raymill.task import TRAIN, VALIDATION, Pipeline, Task
from raymill.tracking import description
from raymill.tracking.description import RUN_ID_TAG
from raymill.tracking.mlflow_client import connect, store_failures
from raymill.training.batch import default_collate

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion
    from mlflow.models import ModelSignature

MAX_EXAMPLE_ROWS = 8
MAX_REASON_LETTERS = 400

VERSIONS_TAG = "mlflow.modelVersions"
"""What MLflow gives a logged model once it is registered."""


def register(folder: RunFolder) -> dict[str, Any]:
    """Register the best weights of a finished run, and move the job's alias to the version.

    Doing it again for the same weights finds the same version. The alias never moves back to an older version. To be called
    within `mlflow_settings`.

    Returns:
        name, version and alias; and not_exported, the reason, where it holds no graph.

    Raises:
        InputError: when the job does not say `register`.
        RunError: when the run has no best checkpoint; or `register.export` is required, and its model cannot be exported, or
            does not compute the same then.
        CheckpointError: when the checkpoint is damaged.
        MlflowException, SQLAlchemyError, OSError: when the store cannot be reached; calling again goes on.
    """
    spec = JobSpec.model_validate(read_record(folder.spec))
    if spec.register_ is None:
        fix = "Add `register: {model: NAME}` to the job."
        raise InputError([Problem("register", "nothing", "the name to register the model under", fix)])
    name, alias = spec.register_.model, spec.register_.alias
    events, _ = read_events(folder.events)
    end = next((event for event in reversed(events) if isinstance(event, RunFinished)), None)
    if end is None or not end.best_checkpoint:
        raise RunError(f"run {folder.run_id} has no best checkpoint to register. Finish it: --resume {folder.run_id}")
    checkpoint = folder.path / end.best_checkpoint
    verify(checkpoint)
    tags = {
        RUN_ID_TAG: folder.run_id,
        WEIGHTS_TAG: read_state(checkpoint, "weights_sha256")["weights_sha256"],
        DATA_TAG: data_digest(folder),
    }
    client = connect()
    same = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in (RUN_ID_TAG, WEIGHTS_TAG))
    found = client.search_model_versions(f"name = '{name}' and {same}")
    made = found[0] if found else _make_version(client, name, folder, spec, checkpoint, end.metrics, tags)
    # Each of these has the same effect when it is done again, after a kill between two of them.
    if not made.description:
        step, rows = read_state(checkpoint, "step")["step"], read_record(folder.plan)["train_rows"]
        text = description.describe_version(name, alias, folder.run_id, step, end.metrics, rows)
        client.update_model_version(name, made.version, text)
    registered = client.get_registered_model(name)
    if not registered.description:
        client.update_registered_model(name, description.describe_model(spec.name))
    current = registered.aliases.get(alias)
    if current is None or int(current) < int(made.version):
        client.set_registered_model_alias(name, alias, made.version)
    found_export = {"not_exported": made.tags[NOT_EXPORTED_TAG]} if NOT_EXPORTED_TAG in made.tags else {}
    return {"name": name, "version": int(made.version), "alias": alias, **found_export}


def _make_version(
    client: MlflowClient,
    name: str,
    folder: RunFolder,
    spec: JobSpec,
    checkpoint: Path,
    metrics: Mapping[str, float],
    tags: dict[str, str],
) -> MlflowVersion:
    import mlflow

    if (code := kept_code.read(folder.path)) is not None:
        kept_code.refuse_to_export(folder, code, code_of(spec))
        tags[CODE_TAG] = code.digest
    model, inputs = rebuild(spec, checkpoint)
    run = client.get_run(read_record(folder.delivery)["mlflow_run_id"])
    step = read_state(checkpoint, "step")["step"]
    with tempfile.TemporaryDirectory() as beside:
        files = _files_beside(folder, checkpoint, Path(beside))
        logged, reason = _new_logged_model(client, name, run, tags), _no_reason_to_export(spec, inputs)
        if inputs is not None and not reason:
            tags[MODEL_TAG], reason = _try_export(model, inputs, logged, step, files)
        if reason:
            tags.pop(MODEL_TAG, None)
            client.delete_logged_model(logged.model_id)
            if spec.register_ is not None and spec.register_.export == "required":
                raise RunError(
                    f"the model of run {folder.run_id} was not registered, since register.export is required: {reason}. Correct "
                    f"its forward(), or register it without a graph: --resume {folder.run_id} --set register.export=try"
                )
            tags[NOT_EXPORTED_TAG] = reason
            logged = _new_logged_model(client, name, run, tags)
            _log_files(logged, step, files)
    return mlflow.register_model(f"models:/{logged.model_id}", name, tags={**tags, **metric_tags(metrics)})


def _no_reason_to_export(spec: JobSpec, inputs: tuple[torch.Tensor, ...] | None) -> str:
    """Why no export is tried; "" where it is."""
    if spec.register_ is not None and spec.register_.export == "never":
        return "register.export is never"
    return "the task has no inputs(batch), the arguments of the model's forward()" if inputs is None else ""


def _try_export(
    model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], logged: LoggedModel, step: int, files: list[str]
) -> tuple[str, str]:
    """Export, upload, load back and compare; returns the archive's SHA-256, and why there is no export after all, or ""."""
    try:
        sha256 = _log(model, inputs, logged, step, files)
        difference = _difference(model, _load_back(logged, sha256), inputs)
    except CheckpointError:
        raise
    except store_failures():
        raise
    except Exception as error:  # torch.export runs the user's code and may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON_LETTERS]
        return "", f"torch.export failed: {why}. forward() must take tensors and must not branch on their values"
    if difference:
        shown = " ".join(difference.split())[:MAX_REASON_LETTERS]
        return (
            "",
            f"exported, it computes something else: {shown}. forward() must be deterministic in eval mode, at any batch size",
        )
    return sha256, ""


def _log_files(logged: LoggedModel, step: int, files: list[str]) -> None:
    """Upload a version that is no graph: weights, job and code, of which raymill builds the model."""
    from mlflow.models import Model

    Model.log(
        None, _WithoutGraph(), name=logged.name, run_id=logged.source_run_id, model_id=logged.model_id, step=step, files=files
    )


def _new_logged_model(client: MlflowClient, name: str, run: Run, tags: Mapping[str, str]) -> LoggedModel:
    """The model beneath the run, still without files. What an earlier try left there without a version goes."""
    experiment, run_id = run.info.experiment_id, run.info.run_id
    for left in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if RUN_ID_TAG in left.tags and VERSIONS_TAG not in left.tags:
            client.delete_logged_model(left.model_id)
    name = name.replace(".", "_")  # MLflow allows none in the name of a logged model
    return client.create_logged_model(experiment, name, run_id, dict(tags), run.data.params)


def _load_back(logged: LoggedModel, sha256: str) -> torch.nn.Module:
    """The exported model as the store has it."""
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as stored:
        model_folder = download_artifacts(f"models:/{logged.model_id}", dst_path=stored)
        return exported.load_exported(Path(model_folder) / exported.FILE, sha256)


def rebuild(spec: JobSpec, checkpoint: Path) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...] | None]:
    """The model of a checkpoint, in eval mode, and the inputs of a few rows [num_rows, ...] of its own data, if it has any."""
    from safetensors.torch import load_file

    from raymill.checkpoint.snapshot import weights_sha256

    pipeline = import_pipeline(spec)
    task = import_task(spec, pipeline.schema)
    model = task.build()
    weights = load_file(checkpoint / WEIGHTS)
    if weights_sha256(weights) != read_state(checkpoint)["weights_sha256"]:
        raise CheckpointError(
            f"{checkpoint}: its weights are not those that were saved; they were changed. Nothing is registered."
        )
    model.load_state_dict(weights, strict=True)
    return model.eval(), None if type(task).inputs is Task.inputs else example_inputs(task, pipeline)


def example_inputs(task: Task, pipeline: Pipeline) -> tuple[torch.Tensor, ...]:
    """What the model takes for the first 2 to 8 rows of the validation split, or else of the training split."""
    split = VALIDATION if VALIDATION in pipeline.sources else TRAIN
    parts = []
    for fragment in pipeline.sources[split].fragments():
        rows, _ = read_good_rows(pipeline, split, fragment, lenient=True)
        if num_rows(rows):
            parts.append(take(rows, slice(0, MAX_EXAMPLE_ROWS)))
        if sum(map(num_rows, parts)) > 1:
            break
    rows = take(join(parts), slice(0, MAX_EXAMPLE_ROWS))
    if num_rows(rows) == 1:
        # torch.export takes an extent of 1 for a constant.
        rows = join([rows, rows])
    rows = pipeline.transform(rows, split, np.random.default_rng(0))
    rows[ROW_ID] = np.arange(num_rows(rows))
    return task.inputs((pipeline.collate or default_collate)(rows))


def _files_beside(folder: RunFolder, checkpoint: Path, beside: Path) -> list[str]:
    """Lay out what a version holds beside the graph, `VERSION_FILES` and their checksums, in a folder; returns the paths."""
    for path in (folder.spec, folder.plan, folder.data_manifest):
        write_record(beside / path.name, read_record(path))
    shutil.copyfile(checkpoint / WEIGHTS, beside / WEIGHTS)
    write_checksums(beside)
    kept_code.copy(folder.path, beside)
    return [str(path) for path in sorted(beside.iterdir())]


class _WithoutGraph:
    """A flavor of MLflow's that holds files alone."""

    def save_model(self, path: str, mlflow_model: Any, files: list[str]) -> None:
        """Lay out the files as MLflow's PyTorch flavor lays out those beside a graph."""
        import mlflow

        beside = Path(path) / "extra_files"
        beside.mkdir(parents=True)
        for file in map(Path, files):
            if file.is_dir():
                shutil.copytree(file, beside / file.name)
            else:
                shutil.copyfile(file, beside / file.name)
        mlflow_model.add_flavor("raymill", files=sorted(path.name for path in beside.iterdir()))
        mlflow_model.save(str(Path(path) / mlflow.models.model.MLMODEL_FILE_NAME))


class _PickleFree:
    """MLflow's PyTorch flavor, with an archive that holds no pickle."""

    sha256 = ""

    def save_model(self, path: str, **arguments: Any) -> None:
        """As `mlflow.pytorch.save_model`."""
        import mlflow

        mlflow.pytorch.save_model(path=path, **arguments)
        archive = Path(path) / exported.FILE
        exported.drop_example_inputs(archive)
        exported.check_archive(archive)
        self.sha256 = file_sha256(archive)


def _log(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], logged: LoggedModel, step: int, files: list[str]) -> str:
    """Export and upload; returns the archive's SHA-256."""
    import mlflow
    import torch
    from mlflow.models import Model

    flavor = _PickleFree()
    arrays = tuple(value.numpy() for value in inputs)
    # `mlflow.pytorch.log_model` without its active run: that belongs to whoever runs this process.
    Model.log(
        None,
        flavor,
        name=logged.name,
        run_id=logged.source_run_id,
        model_id=logged.model_id,
        # MLflow gives the model the run's metrics of this step: points that the run has already, so none is doubled.
        step=step,
        pytorch_model=model,
        input_example=arrays[0] if len(arrays) == 1 else arrays,
        signature=_signature(model, inputs),
        serialization_format="pt2",
        pip_requirements=[
            f"torch=={torch.__version__.partition('+')[0]}",
            f"numpy=={np.__version__}",
            f"mlflow=={mlflow.__version__}",
        ],
        extra_files=files,
    )
    return flavor.sha256


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


def _difference(model: torch.nn.Module, loaded: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> str:
    """How the outputs differ, for the example and for a batch of another size; "" when they do not."""
    import torch

    for batch in (inputs, tuple(torch.cat([value, value]) for value in inputs)):
        with torch.no_grad():
            expected, got = model(*batch), loaded(*batch)
        try:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        except AssertionError as error:
            return str(error)
    return ""
