"""Model versions: MLflow's registry, as raymill uses it. A version is one set of weights of one run.

A version holds the exported graph (pt2, batch size free), and beside it what is needed to train on or to rebuild the
model: `weights.safetensors`, `spec.json`, `plan.json` and the checkpoint's `manifest.json`. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raymill.bad_rows import sift
from raymill.collate import as_batch
from raymill.errors import InputError, Problem, RunError, TrackingError, did_you_mean
from raymill.home import RunFolder
from raymill.order import TRAIN, VALIDATION
from raymill.redaction import redact
from raymill.rows import ROW_ID, join, num_rows, take
from raymill.spec import NAME, JobSpec
from raymill.task import Pipeline, Task
from raymill.tracking import connect, data_digest, read_events, store_failures

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion
    from mlflow.models import ModelSignature

MOST_EXAMPLE_ROWS = 8
RUN_ID_TAG, WEIGHTS_TAG, DATA_TAG, METRICS_TAG = (
    f"raymill.{name}" for name in ("run_id", "weights_sha256", "data_digest", "metrics")
)


@dataclass(frozen=True)
class ModelVersion:
    """A registered version.

    Attributes:
        name: the registered model.
        version: 1, 2, ...
        alias: the alias it was found by or given; else one that points to it, or None.
        run_id: the raymill run that trained it.
        metrics: the run's final metrics.
    """

    name: str
    version: int
    alias: str | None
    run_id: str
    metrics: Mapping[str, float]

    @property
    def uri(self) -> str:
        """What MLflow's own functions take."""
        return f"models:/{self.name}/{self.version}"


# ---------------------------------------------------------------- registering


def register(folder: RunFolder) -> ModelVersion:
    """Register the best weights of a finished run, and move the job's alias to the version.

    Doing it again for the same weights finds the same version. The alias never moves back to an older version.

    Raises:
        InputError: when the job does not say `register`.
        RunError: when the run has no best checkpoint, or its model cannot be exported, or the exported model does not
            compute what the original does.
        CheckpointError: when the checkpoint is damaged.
        MlflowException, SQLAlchemyError, OSError: when the store cannot be reached; calling again goes on.
    """
    from raymill.checkpoint import verify

    spec = JobSpec.model_validate_json(folder.spec.read_text())
    if spec.register_ is None:
        fix = "Add `register: {model: NAME}` to the job."
        raise InputError([Problem("register", "nothing", "the name to register the model under", fix)])
    name, alias = spec.register_.model, spec.register_.alias
    events, _ = read_events(folder.events)
    end = next((event for event in reversed(events) if event["kind"] == "end"), None)
    if end is None or not end["best_checkpoint"]:
        raise RunError(f"run {folder.run_id} has no best checkpoint to register. Finish it: --resume {folder.run_id}")
    checkpoint = folder.path / end["best_checkpoint"]
    verify(checkpoint)
    tags = {
        RUN_ID_TAG: folder.run_id,
        WEIGHTS_TAG: json.loads((checkpoint / "state.json").read_text())["weights_sha256"],
        DATA_TAG: data_digest(folder),
        METRICS_TAG: json.dumps(end["metrics"]),
    }
    client = connect()
    same = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in (RUN_ID_TAG, WEIGHTS_TAG))
    found = client.search_model_versions(f"name = '{name}' and {same}")
    made = found[0] if found else _make_version(client, name, folder, spec, checkpoint, tags)
    current = client.get_registered_model(name).aliases.get(alias)
    if current is None or int(current) < int(made.version):
        client.set_registered_model_alias(name, alias, made.version)
    return ModelVersion(name, int(made.version), alias, folder.run_id, end["metrics"])


def _make_version(
    client: MlflowClient, name: str, folder: RunFolder, spec: JobSpec, checkpoint: Path, tags: dict[str, str]
) -> MlflowVersion:
    import mlflow

    model, inputs = rebuild(spec, checkpoint)
    run = client.get_run(json.loads(folder.delivered.read_text())["mlflow_run_id"])
    logged = client.create_logged_model(run.info.experiment_id, "model", source_run_id=run.info.run_id, tags=tags)
    try:
        with tempfile.TemporaryDirectory() as beside:
            files = _files_beside(folder, checkpoint, Path(beside))
            _log(model, inputs, logged.model_id, run.info.run_id, files)
        difference = _difference(model, mlflow.pytorch.load_model(f"models:/{logged.model_id}"), inputs)
    except store_failures():
        raise
    except Exception as error:  # torch.export runs the user's code and may raise anything
        raise RunError(
            f"the model of run {folder.run_id} was not registered: no export: {type(error).__name__}: {error}. "
            "forward() must take tensors and must not branch on their values."
        ) from error
    if difference:
        client.delete_logged_model(logged.model_id)
        raise RunError(
            f"the model of run {folder.run_id} was not registered: exported, it computes something else: {difference}. "
            "Make forward() deterministic in eval mode and free of the batch size."
        )
    return mlflow.register_model(f"models:/{logged.model_id}", name, tags=tags)


def rebuild(spec: JobSpec, checkpoint: Path) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """The model of a checkpoint, in eval mode, and the inputs of a few rows [num_rows, ...] of its own data."""
    from safetensors.torch import load_file

    from raymill.load import import_pipeline, import_task

    pipeline = import_pipeline(spec)
    task = import_task(spec, pipeline.schema)
    model = task.build()
    model.load_state_dict(load_file(checkpoint / "weights.safetensors"), strict=True)
    return model.eval(), example_inputs(task, pipeline)


def example_inputs(task: Task, pipeline: Pipeline) -> tuple[torch.Tensor, ...]:
    """What the model takes for the first 2 to 8 rows of the validation split, or else of the training split."""
    split = VALIDATION if VALIDATION in pipeline.sources else TRAIN
    parts = []
    for fragment in pipeline.sources[split].fragments():
        rows, _ = sift(pipeline, split, fragment, lenient=True)
        if num_rows(rows):
            parts.append(take(rows, slice(0, MOST_EXAMPLE_ROWS)))
        if sum(map(num_rows, parts)) > 1:
            break
    rows = take(join(parts), slice(0, MOST_EXAMPLE_ROWS))
    if num_rows(rows) == 1:
        # torch.export takes an extent of 1 for a constant.
        rows = join([rows, rows])
    rows = pipeline.transform(rows, split, np.random.default_rng(0))
    rows[ROW_ID] = np.arange(num_rows(rows))
    return task.inputs((pipeline.collate or as_batch)(rows))


def _files_beside(folder: RunFolder, checkpoint: Path, beside: Path) -> list[str]:
    for path in (folder.spec, folder.plan):
        (beside / path.name).write_text(json.dumps(redact(json.loads(path.read_text())), indent=1))
    saved = [checkpoint / "weights.safetensors", checkpoint / "manifest.json"]
    return [str(path) for path in (*beside.iterdir(), *saved)]


def _log(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], model_id: str, run_id: str, files: list[str]) -> None:
    import mlflow
    import torch
    from mlflow.models import Model

    arrays = tuple(value.numpy() for value in inputs)
    # `mlflow.pytorch.log_model` without its active run: that belongs to whoever runs this process.
    Model.log(
        None,
        mlflow.pytorch,
        name="model",
        run_id=run_id,
        model_id=model_id,
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


# ---------------------------------------------------------------- looking up


def list_models() -> list[dict[str, Any]]:
    """All registered models: name, aliases (alias -> version), versions (newest first) and updated_s (Unix seconds).

    Raises:
        TrackingError: when the registry cannot be reached.
    """
    with _registry() as client:
        return [
            {
                "name": model.name,
                "aliases": {alias: int(version) for alias, version in model.aliases.items()},
                "versions": [int(found.version) for found in _versions(client, f"name = '{model.name}'")],
                "updated_s": model.last_updated_timestamp / 1000,
            }
            for model in client.search_registered_models()
        ]


def show_model(reference: str) -> dict[str, Any]:
    """What is known of one version: name, version, aliases, run_id, metrics, weights_sha256, data_digest, created_s.

    Raises:
        InputError: when there is no such model.
        TrackingError: when the registry cannot be reached.
    """
    found = resolve(reference)
    with _registry() as client:
        version = client.get_model_version(found.name, str(found.version))
        return {
            "name": found.name,
            "version": found.version,
            "aliases": sorted(version.aliases),
            "run_id": found.run_id,
            "metrics": dict(found.metrics),
            "weights_sha256": version.tags.get(WEIGHTS_TAG),
            "data_digest": version.tags.get(DATA_TAG),
            "created_s": version.creation_timestamp / 1000,
        }


def resolve(reference: str) -> ModelVersion:
    """Find a version by `name@alias`, `name/version` or the id of the run that trained it.

    Raises:
        InputError: when there is none; names the nearest.
        TrackingError: when the registry cannot be reached.
    """
    with _registry() as client:
        aliases = {model.name: model.aliases for model in client.search_registered_models()}
        name, at, alias = reference.partition("@")
        number = aliases.get(name, {}).get(alias) if at else None
        if not at:
            name, _, number = reference.rpartition("/")
        if name in aliases and number is not None:
            found = [made for made in _versions(client, f"name = '{name}'") if str(made.version) == str(number)]
        elif NAME.fullmatch(reference):
            found = _versions(client, f"tags.`{RUN_ID_TAG}` = '{reference}'")
        else:
            found = []
        if found:
            made = found[0]
            pointing = sorted(key for key, to in aliases[made.name].items() if str(to) == str(made.version))
            metrics = json.loads(made.tags.get(METRICS_TAG, "{}"))
            shown = alias or next(iter(pointing), None)
            return ModelVersion(made.name, int(made.version), shown, made.tags.get(RUN_ID_TAG, ""), metrics)
        valid = [f"{made.name}/{made.version}" for made in _versions(client, None)]
        valid += [f"{model}@{key}" for model, keys in aliases.items() for key in keys]
    expected = "name@alias, name/version or the id of a run whose model is registered"
    raise InputError([Problem("model", repr(reference), expected, did_you_mean(reference, valid))])


def model_files(version: ModelVersion) -> Path:
    """The local folder with `weights.safetensors`, `spec.json`, `plan.json` and `manifest.json` of a version.

    Downloads them when the store keeps its files elsewhere.

    Raises:
        TrackingError: when the registry cannot be reached.
    """
    with _registry():
        from mlflow.artifacts import download_artifacts

        return Path(download_artifacts(artifact_uri=version.uri)) / "extra_files"


def _versions(client: MlflowClient, where: str | None) -> list[MlflowVersion]:
    """Newest first."""
    return sorted(client.search_model_versions(where), key=lambda made: int(made.version), reverse=True)


@contextmanager
def _registry() -> Iterator[MlflowClient]:
    try:
        yield connect()
    except store_failures() as error:
        raise TrackingError(f"the model registry cannot be reached: {error}. Check MLFLOW_TRACKING_URI.") from error
