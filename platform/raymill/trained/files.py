"""A trained model laid out in a folder of its own, as a registered version and a job's input hold it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymill.checkpoint.directory import WEIGHTS, write_checksums
from raymill.files import make_private_folder, read_record, write_record
from raymill.record import fitted, kept_code
from raymill.record import inputs as record_inputs
from raymill.record.inputs import Pinned
from raymill.trained.model import SIGNATURE, VERSION_FILES, Trained


def lay_out(trained: Trained, to: Path, signature: Mapping[str, Any] | None = None) -> None:
    """Copy all that is needed to make the model again into a folder, with checksums: the models that its job was given too.

    Args:
        signature: what the model takes and gives; None: as its own records say, if they do.
    """
    make_private_folder(to)
    for name in VERSION_FILES:
        if name != WEIGHTS:
            write_record(to / name, read_record(trained.records / name))
    if signature is None and (trained.records / SIGNATURE).exists():
        signature = read_record(trained.records / SIGNATURE)
    if signature is not None:
        write_record(to / SIGNATURE, signature)
    shutil.copyfile(trained.weights, to / WEIGHTS)
    fitted.keep(to, trained.fitted)
    pinned = record_inputs.read(trained.records)
    keep_inputs(to, {name: (pinned[name].reference, one) for name, one in trained.inputs.items()})
    write_checksums(to)
    kept_code.copy(trained.records, to)


def keep_inputs(records: Path, given: Mapping[str, tuple[str, Trained]], init_from: tuple[str, Trained] | None = None) -> None:
    """Copy the models that a job is given beside its records, and say which they were.

    Args:
        given: name -> what the job file says, and what that was.
        init_from: likewise, of what the run begins with, which is not copied.
    """
    for name, (_, trained) in given.items():
        lay_out(trained, record_inputs.place(records, name))
    pinned = {name: _pinned(reference, trained) for name, (reference, trained) in given.items()}
    record_inputs.keep(records, pinned, _pinned(*init_from) if init_from else None)


def _pinned(reference: str, trained: Trained) -> Pinned:
    changes = trained.code_changes()
    return Pinned(
        reference=reference,
        model=trained.name,
        run_id=trained.run_id,
        weights_sha256=trained.weights_sha256,
        code_changes=tuple(map(str, changes or ())),
    )
