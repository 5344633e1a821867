"""A finished run's best weights become a version of a registered model.

A version holds what is needed to train on, to rebuild the model or to ask it: weights, spec, plan, data manifest, and what it
takes and gives, with the checksums of all; and the exported graph (pt2, batch size free) where there is one, see `artifact`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill.checkpoint.directory import read_state, verify
from raymill.config.spec import JobSpec, RegisterSpec
from raymill.data.arrow import schema_of
from raymill.data.bad_rows import read_good_rows
from raymill.data.rows import join, num_rows, take
from raymill.errors import InputError, Problem, RaymillError, RunError
from raymill.files import read_record, waiting_lock, write_record
from raymill.models.artifact import Artifact
from raymill.models.find import at_checkpoint
from raymill.models.registry import (
    CODE_TAG,
    DATA_TAG,
    GIVES_TAG,
    MODEL_TAG,
    NOT_EXPORTED_TAG,
    TAKES_TAG,
    WEIGHTS_TAG,
    metric_tags,
    registry_settings,
)
from raymill.models.signature import as_record, in_words
from raymill.own_code import contracts
from raymill.own_code.export import reason
from raymill.own_code.traces import tell
from raymill.record import kept_code
from raymill.record.catalog import data_digest, find_run
from raymill.record.events import RunFinished, read_events
from raymill.record.folder import RunFolder
from raymill.redaction import redact_text
from raymill.task import TRAIN, VALIDATION, Batch, Pipeline, Rows, Schema, Task
from raymill.tracking import description
from raymill.tracking.description import RUN_ID_TAG
from raymill.tracking.mlflow_client import connect
from raymill.tracking.mlflow_sync import deliver_all
from raymill.trained.files import lay_out
from raymill.trained.model import Trained
from raymill.training.batch import asked_schema, prediction_batch

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

MAX_EXAMPLE_ROWS = 8

VERSIONS_TAG = "mlflow.modelVersions"
"""What MLflow gives a logged model once it is registered."""


def register(folder: RunFolder, export: str | None = None, under: RegisterSpec | None = None) -> dict[str, Any]:
    """Register the best weights of a finished run, and move the job's alias to the version.

    Doing it again for the same weights finds the same version. The alias never moves back to an older version. To be called
    within `mlflow_settings`.

    Args:
        export: in place of the job's `register.export`.
        under: in place of the job's `register`.

    Returns:
        name, version and alias; and not_exported, why the version has no exported graph, where it has none.

    Raises:
        InputError: when the job does not say `register`, or the task cannot be asked.
        RunError: when the run has no best checkpoint, or an export is required and the model cannot be exported, or the exported
            model does not compute what the original does.
        CheckpointError: when the checkpoint is damaged.
        MlflowException, SQLAlchemyError, OSError: when the store cannot be reached; calling again goes on.
    """
    spec = JobSpec.model_validate(read_record(folder.spec))
    chosen = under or spec.register_
    if chosen is None:
        fix = "Add `register: {model: NAME}` to the job."
        raise InputError([Problem("register", "nothing", "the name to register the model under", fix)])
    name, alias, export = chosen.model, chosen.alias, export or chosen.export
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
    found: Sequence[MlflowVersion] = client.search_model_versions(f"name = '{name}' and {same}")
    if export == "required":
        found = [one for one in found if NOT_EXPORTED_TAG not in one.tags]
    made = found[0] if found else _make_version(client, name, folder, spec, export, checkpoint, end.metrics, tags)
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
    why_not = client.get_model_version(name, made.version).tags.get(NOT_EXPORTED_TAG)
    return {"name": name, "version": int(made.version), "alias": alias, **({"not_exported": why_not} if why_not else {})}


def register_run(run_id: str, export: str | None = None) -> dict[str, Any]:
    """Register the model of a finished run by hand: again with other code or another `export`, or where it could not be before.

    Raises:
        InputError, RunError, CheckpointError: see `register`; or there is no such run.
        TrackingError: the registry cannot be reached.
    """
    folder = find_run(run_id)
    again = partial(register, export=export)
    # What of the run's events is not delivered yet goes first; at their end the model is registered as well.
    deliver_all(folder, again)
    with waiting_lock(folder.delivery_lock), registry_settings():
        made = again(folder)
        write_record(folder.model_version, made)
    return made


def _make_version(
    client: MlflowClient,
    name: str,
    folder: RunFolder,
    spec: JobSpec,
    export: str,
    checkpoint: Path,
    metrics: Mapping[str, float],
    tags: dict[str, str],
) -> MlflowVersion:
    import mlflow

    trained = at_checkpoint(folder, checkpoint)
    if (code := kept_code.read(folder.path)) is not None:
        kept_code.refuse_to_export(folder, code, trained.code_changes() or [])
        tags[CODE_TAG] = code.digest
    try:
        rebuilt = rebuild(trained)
    except (RaymillError, OSError):
        raise
    except Exception as error:  # the job's own code
        raise RunError(f"the model of run {folder.run_id} was not registered: {tell(error)}") from error
    takes, gives = rebuilt.takes, schema_of(rebuilt.answer)
    inputs, why_not = _inputs(rebuilt, export)
    run = client.get_run(read_record(folder.delivery)["mlflow_run_id"])
    logged = _new_logged_model(client, name, run, tags)
    with tempfile.TemporaryDirectory() as beside:
        lay_out(trained, Path(beside), {"takes": as_record(takes), "gives": as_record(gives)})
        made = Artifact(rebuilt.model, inputs, sorted(Path(beside).iterdir()), why_not)
        made.log(logged, read_state(checkpoint, "step")["step"])
    if made.not_exported and export == "required":
        client.delete_logged_model(logged.model_id)
        raise RunError(
            f"the model of run {folder.run_id} was not registered: no export: {made.not_exported}. Let forward() take tensors, "
            "be free of the batch size and deterministic, and not branch on values; or register it as it is: "
            f"raymill models register {folder.run_id} --export try"
        )
    tags[TAKES_TAG], tags[GIVES_TAG] = in_words(takes), in_words(gives)
    tags |= {NOT_EXPORTED_TAG: redact_text(made.not_exported)} if made.not_exported else {MODEL_TAG: made.sha256}
    return mlflow.register_model(f"models:/{logged.model_id}", name, tags={**tags, **metric_tags(metrics)})


def _inputs(rebuilt: Rebuilt, export: str) -> tuple[tuple[torch.Tensor, ...] | None, str]:
    """An example for the forward pass, or why there is none."""
    if export == "never":
        return None, "the job says `register.export: never`"
    try:
        return contracts.inputs(rebuilt.task, rebuilt.batch), ""
    except InputError as error:
        return None, error.problems[0].found
    except Exception as error:  # the job's own code
        return None, reason(error)


def _new_logged_model(client: MlflowClient, name: str, run: Run, tags: Mapping[str, str]) -> LoggedModel:
    """The model beneath the run, still without files. What an earlier try left there without a version goes."""
    experiment, run_id = run.info.experiment_id, run.info.run_id
    for left in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if RUN_ID_TAG in left.tags and VERSIONS_TAG not in left.tags:
            client.delete_logged_model(left.model_id)
    name = name.replace(".", "_")  # MLflow allows none in the name of a logged model
    return client.create_logged_model(experiment, name, run_id, dict(tags), run.data.params)


@dataclass(frozen=True)
class Rebuilt:
    """A model of a checkpoint, asked about a few rows of its own data.

    Attributes:
        task: the user's Task.
        model: in eval mode, on the CPU.
        takes: the columns of a question.
        batch: the rows that it was asked about, as its task takes them.
        answer: what it said.
    """

    task: Task
    model: torch.nn.Module
    takes: Schema
    batch: Batch
    answer: Rows


def rebuild(trained: Trained) -> Rebuilt:
    """The model, with an example of what it takes and gives.

    Raises:
        CheckpointError: the weights are not those that were saved, or do not fit.
        InputError: what the task says of the rows is no value for each.
    """
    pipeline = trained.pipeline()
    task = trained.task(pipeline)
    model = trained.build(task)
    rows = example_rows(pipeline)
    batch = prediction_batch(pipeline, rows)
    return Rebuilt(task, model, asked_schema(pipeline), batch, contracts.predict(task, model, batch, num_rows(rows)))


def example_rows(pipeline: Pipeline) -> Rows:
    """The first 2 to 8 rows of the validation split, or else of the training split."""
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
    return rows
