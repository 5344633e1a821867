"""What was fitted for a run, kept beside its records and in the model version: read instead of being fitted again."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from pathlib import Path

from raymill.errors import CheckpointError
from raymill.files import read_record, write_record

FILE = "fitted.json"
"""In a run's folder, and in a model version."""


def keep(folder: Path, fitted: Mapping[str, bytes]) -> None:
    """Write the artefacts of a run, with their SHA-256; nothing where there is none."""
    if fitted:
        entries = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "base64": base64.b64encode(data).decode()}
            for name, data in fitted.items()
        }
        write_record(folder / FILE, {"artefacts": entries})


def read(folder: Path) -> dict[str, bytes]:
    """The artefacts of a run or a model version; empty where nothing was fitted.

    Raises:
        CheckpointError: names the artefact that is not what was fitted.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    found = {}
    try:
        for name, entry in read_record(path)["artefacts"].items():
            found[name] = base64.b64decode(entry["base64"], validate=True)
            if hashlib.sha256(found[name]).hexdigest() != entry["sha256"]:
                raise CheckpointError(f"{path}: artefact {name!r} is not what was fitted; it was damaged or changed. {_AGAIN}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}: {error}. {_AGAIN}") from error
    return found


_AGAIN = "Restore it, or start a new run."
