"""Which trained models a run was given, by name; their files lie beside, so that the run needs no registry for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from raymill.errors import CheckpointError
from raymill.files import make_private_folder, read_record, write_record
from raymill.record.folder import is_run_id

FILE, FOLDER = "inputs.json", "inputs"
"""In a run's folder, and in a model version."""


class Pinned(BaseModel):
    """What a reference to a model was when the run began.

    Attributes:
        reference: as in the job file, such as mnist@live.
        model: "name/version", or the id of a run.
        run_id: the run that trained it.
        weights_sha256: of its weights.
        code_changes: how the code of its task differed by then from the code that trained it.
    """

    model_config = ConfigDict(frozen=True)

    reference: str
    model: str
    run_id: str
    weights_sha256: str
    code_changes: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = self.model if self.reference == self.model else f"{self.reference}, which was {self.model}"
        return f"{named} (weights {self.weights_sha256[:12]})"


def place(records: Path, name: str) -> Path:
    """The folder with the files of an input, beside the records of the run or the version that was given it."""
    return records / FOLDER / name


def keep(records: Path, pinned: Mapping[str, Pinned], init_from: Pinned | None = None) -> None:
    """Write down what was given; nothing where nothing was.

    Args:
        init_from: what the run began with.
    """
    if pinned or init_from:
        inputs = {name: one.model_dump(mode="json") for name, one in pinned.items()}
        write_record(records / FILE, {"inputs": inputs, "init_from": init_from and init_from.model_dump(mode="json")})


def read(records: Path) -> dict[str, Pinned]:
    """What was given; empty where nothing was.

    Raises:
        CheckpointError: the record is damaged.
    """
    return _read(records)[0]


def described(records: Path) -> dict[str, str]:
    """All that other runs have made for this one, in words, by the field of its job.

    Raises:
        CheckpointError: the record is damaged.
    """
    pinned, init_from = _read(records)
    return {f"inputs.{name}": str(one) for name, one in pinned.items()} | ({"init_from": str(init_from)} if init_from else {})


def _read(records: Path) -> tuple[dict[str, Pinned], Pinned | None]:
    if not (records / FILE).exists():
        return {}, None
    try:
        record = read_record(records / FILE)
        found, init_from = record["inputs"], record.get("init_from")
        if strange := [name for name in found if not is_run_id(name)]:
            raise ValueError(f"names of inputs that are no plain names: {strange}")
        pinned = {name: Pinned.model_validate(one) for name, one in found.items()}
        return pinned, Pinned.model_validate(init_from) if init_from else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = "other values than raymill writes" if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{records / FILE}: cannot be read: {what}. Restore it, or start a new run.") from error


def notes(records: Path) -> list[str]:
    """What people should know of the models that a run was given."""
    changed = {name: one for name, one in read(records).items() if one.code_changes}
    return [
        f"input {name} is {one}, whose code was changed since it was trained: {', '.join(one.code_changes)}; today's code runs"
        for name, one in changed.items()
    ]


def pack(records: Path) -> dict[str, bytes]:
    """All files of a run's inputs by their place in its folder, for a machine that does not see it."""
    if not (records / FILE).exists():
        return {}
    paths = [records / FILE, *(path for path in sorted((records / FOLDER).rglob("*")) if path.is_file())]
    return {path.relative_to(records).as_posix(): path.read_bytes() for path in paths}


def unpack(packed: Mapping[str, bytes], to: Path) -> None:
    """Write what `pack` gave below a folder."""
    for name, content in packed.items():
        make_private_folder((to / name).parent)
        (to / name).write_bytes(content)
