"""A trained model by its name in the registry, or by the run that made it."""

from __future__ import annotations

from pathlib import Path

from raymill.checkpoint.directory import read_pointer, read_state, verify
from raymill.errors import InputError, Problem
from raymill.models import registry
from raymill.record.folder import RunFolder, is_run_id, run_folder
from raymill.trained.model import MAY_HAVE, VERSION_FILES, Trained, from_records


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
        return at_checkpoint(folder, _best_checkpoint(folder))
    version = registry.resolve(reference)
    files = registry.model_files(version)
    verify(files, VERSION_FILES, MAY_HAVE)
    return from_records(f"{version.name}/{version.version}", version.run_id, files, version.weights_sha256, files)


def at_checkpoint(folder: RunFolder, checkpoint: Path) -> Trained:
    """The model of a run as it is in one of its checkpoints.

    Raises:
        CheckpointError: the checkpoint is not whole.
    """
    verify(checkpoint)
    recorded = read_state(checkpoint, "weights_sha256")["weights_sha256"]
    return from_records(folder.run_id, folder.run_id, checkpoint, recorded, folder.path)


def _best_checkpoint(folder: RunFolder) -> Path:
    pointer = read_pointer(folder.checkpoints)
    if pointer is None:
        fix = f"Go on with it: --resume {folder.run_id}"
        raise InputError([Problem(f"run {folder.run_id}", "no checkpoint", "at least one", fix)])
    return folder.checkpoints / (pointer.best or pointer.latest)
