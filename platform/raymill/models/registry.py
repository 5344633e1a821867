"""The model versions there are: MLflow's registry, as raymill reads it. `registration` makes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill.errors import InputError, Problem, TrackingError, did_you_mean
from raymill.record.folder import is_run_id
from raymill.redaction import redact_text
from raymill.tracking.description import RUN_ID_TAG
from raymill.tracking.mlflow_client import connect, mlflow_settings, nothing_is_stored, plain_key, store_failures

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

WEIGHTS_TAG, MODEL_TAG, DATA_TAG, CODE_TAG = (
    f"raymill.{name}" for name in ("weights_sha256", "model_sha256", "data_digest", "code_digest")
)

NOT_EXPORTED_TAG = "raymill.not_exported"
"""Why a version has no exported graph; absent where it has one."""

TAKES_TAG, GIVES_TAG = "raymill.takes", "raymill.gives"
"""The columns of a question and of an answer, in words; the version's signature.json has them to be read."""

METRIC_TAG = "raymill.metric."
"""Followed by a metric's name: its value."""

METRICS_TAG = "raymill.metrics"
"""All metrics as JSON, in versions that raymill 0.2 made."""


@dataclass(frozen=True)
class ModelVersion:
    """A registered version.

    Attributes:
        name: the registered model.
        version: 1, 2, ...
        alias: the alias it was found by or given; else one that points to it, or None.
        run_id: the raymill run that trained it.
        metrics: the run's final metrics.
        weights_sha256: of its weights, as the registry has it.
    """

    name: str
    version: int
    alias: str | None
    run_id: str
    metrics: Mapping[str, float]
    weights_sha256: str

    @property
    def uri(self) -> str:
        """What MLflow's own functions take."""
        return f"models:/{self.name}/{self.version}"


def metric_tags(metrics: Mapping[str, float]) -> dict[str, str]:
    """The tags that hold a version's metrics; `read_metrics` makes the same numbers of them."""
    return {plain_key(f"{METRIC_TAG}{name}"): repr(float(value)) for name, value in metrics.items()}


def read_metrics(tags: Mapping[str, str]) -> dict[str, float]:
    """The metrics of a version, by name."""
    found = {key.removeprefix(METRIC_TAG): float(value) for key, value in tags.items() if key.startswith(METRIC_TAG)}
    return found or json.loads(tags.get(METRICS_TAG, "{}"))


def list_models() -> list[dict[str, Any]]:
    """All registered models: name, aliases (alias -> version), versions (newest first) and updated_s (Unix seconds).

    Raises:
        TrackingError: when the registry cannot be reached.
    """
    if nothing_is_stored():
        return []
    with registry_settings() as client:
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
    """What is known of one version: name, version, aliases, run_id, metrics, weights_sha256, data_digest, takes and gives (the
    columns of a question and of an answer, in words), exported, not_exported (why), code_digest, code (where MLflow keeps the
    code that trained it), created_s.

    Raises:
        InputError: when there is no such model.
        TrackingError: when the registry cannot be reached.
    """
    found = resolve(reference)
    with registry_settings() as client:
        version = client.get_model_version(found.name, str(found.version))
        return {
            "name": found.name,
            "version": found.version,
            "aliases": sorted(version.aliases),
            "run_id": found.run_id,
            "metrics": dict(found.metrics),
            "weights_sha256": version.tags.get(WEIGHTS_TAG),
            "data_digest": version.tags.get(DATA_TAG),
            "takes": version.tags.get(TAKES_TAG),
            "gives": version.tags.get(GIVES_TAG),
            "exported": NOT_EXPORTED_TAG not in version.tags,
            "not_exported": version.tags.get(NOT_EXPORTED_TAG),
            "code": f"{found.uri}/extra_files/code" if version.tags.get(CODE_TAG) else None,
            "code_digest": version.tags.get(CODE_TAG),
            "created_s": version.creation_timestamp / 1000,
        }


def resolve(reference: str) -> ModelVersion:
    """Find a version by `name@alias`, `name/version` or the id of the run that trained it.

    Raises:
        InputError: when there is none; names the nearest.
        TrackingError: when the registry cannot be reached.
    """
    if nothing_is_stored():
        raise _no_model(reference, [])
    with registry_settings() as client:
        aliases = {model.name: model.aliases for model in client.search_registered_models()}
        name, at, alias = reference.partition("@")
        number = aliases.get(name, {}).get(alias) if at else None
        if not at:
            name, _, number = reference.rpartition("/")
        if name in aliases and number is not None:
            found = [made for made in _versions(client, f"name = '{name}'") if str(made.version) == str(number)]
        elif is_run_id(reference):
            found = _versions(client, f"tags.`{RUN_ID_TAG}` = '{reference}'")
        else:
            found = []
        if found:
            made = found[0]
            pointing = sorted(key for key, to in aliases[made.name].items() if str(to) == str(made.version))
            metrics = read_metrics(made.tags)
            shown = alias or next(iter(pointing), None)
            return ModelVersion(
                made.name, int(made.version), shown, made.tags.get(RUN_ID_TAG, ""), metrics, made.tags.get(WEIGHTS_TAG, "")
            )
        valid = [f"{made.name}/{made.version}" for made in _versions(client, None)]
        valid += [f"{model}@{key}" for model, keys in aliases.items() for key in keys]
    raise _no_model(reference, valid)


def _no_model(reference: str, valid: list[str]) -> InputError:
    expected = "name@alias, name/version or the id of a run whose model is registered"
    name = re.split("[@/]", reference)[0]
    under = "" if name == reference else f" (`register: {{model: {name}}}`)"
    train = f"Train the job that registers it{under}"
    fix = (
        f"{did_you_mean(reference, valid)} {train}, or name one of these." if valid else f"{train} first: there is no model yet."
    )
    return InputError([Problem("model", repr(reference), expected, fix)])


def model_files(version: ModelVersion) -> Path:
    """The local folder with the files of a version, those of `trained.files.lay_out`.

    Downloads them when the store keeps its files elsewhere.

    Raises:
        TrackingError: when the registry cannot be reached.
    """
    with registry_settings():
        from mlflow.artifacts import download_artifacts

        return Path(download_artifacts(artifact_uri=version.uri)) / "extra_files"


def _versions(client: MlflowClient, where: str | None) -> list[MlflowVersion]:
    """Newest first."""
    return sorted(client.search_model_versions(where), key=lambda made: int(made.version), reverse=True)


@contextmanager
def registry_settings() -> Iterator[MlflowClient]:
    """Within this, MLflow is the project's store, as the client that is given; where it cannot be reached, a TrackingError."""
    try:
        with mlflow_settings():
            yield connect()
    except store_failures() as error:
        why = redact_text(str(error))
        raise TrackingError(f"the model registry cannot be reached: {why}. Check MLFLOW_TRACKING_URI.") from error
