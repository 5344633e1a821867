"""The exported graph of a model version, `model.pt2`: written without pickles, and checked before anything of it is loaded.

`torch.export.save` writes its example inputs with pickle, and `torch.export.load` reads pickles wherever an archive holds them,
also where MLflow's switch against pickles is on: a legacy weights file beside a config that denies it is enough. So an archive
is refused unless each of its records is one of those that are needed and none of them is pickled.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill.checkpoint.directory import file_sha256
from raymill.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FILE = "data/model.pt2"
"""Where MLflow puts the archive in a model's folder."""

SAMPLE_INPUTS = "data/sample_inputs/model.pt"
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
TEXTS = ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id")
TEXT = re.compile(rb"[A-Za-z0-9._-]{1,64}\n?")
TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d{1,9}")


def drop_example_inputs(archive: Path) -> None:
    """Rewrite an archive with an empty record of example inputs, which torch takes for none."""
    draft = archive.with_suffix(".draft")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            empty = info.filename.endswith(f"/{SAMPLE_INPUTS}")
            new.writestr(info.filename, b"" if empty else old.read(info))
    draft.replace(archive)


def check_archive(archive: Path) -> None:
    """Refuse an archive that could hold a pickle.

    Raises:
        CheckpointError: names the record that is one too many, missing, or not what it must be.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{archive}: {what}. It is not loaded, since loading it could run code. Train the model again.")

    try:
        with zipfile.ZipFile(archive) as opened:
            infos = opened.infolist()
            names = [info.filename.partition("/")[2] for info in infos]
            roots = {info.filename.partition("/")[0] for info in infos}
            if len(set(names)) < len(names) or len(roots) != 1:
                raise refuse("two of its records have one name, or it holds more than one archive")
            records = dict(zip(names, infos, strict=True))
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise refuse("its records are compressed")
            texts = {name: opened.read(records[name]) for name in TEXTS if name in records}
            configs = {name: json.loads(opened.read(records[name])) for name in CONFIGS if name in records}
    except (OSError, zipfile.BadZipFile, ValueError, RecursionError) as error:
        raise refuse(f"it cannot be read: {error}") from error
    if wrong := next((name for name, text in texts.items() if not TEXT.fullmatch(text)), None):
        raise refuse(f"its record {wrong!r} is not a word")
    needed = {*CONFIGS, SAMPLE_INPUTS, "models/model.json", "archive_format", "archive_version"}
    if missing := needed - set(names):
        raise refuse(f"its record {min(missing)!r} is missing")
    if records[SAMPLE_INPUTS].file_size:
        raise refuse("it holds example inputs, which are a pickle")
    tensors = {name for config, values in configs.items() for name in _tensors(config, values, refuse)}
    if odd := set(names) - needed - set(TEXTS) - tensors:
        raise refuse(f"its record {min(odd)!r} does not belong there")


def _tensors(config: str, values: Any, refuse: Any) -> set[str]:
    """The records of plain tensor bytes that a config names."""
    folder = config.rpartition("/")[0]
    entries = values.get("config") if isinstance(values, Mapping) else None
    if not isinstance(entries, Mapping):
        raise refuse(f"its record {config!r} is no config")
    found = set()
    for entry in entries.values():
        name = f"{folder}/{entry.get('path_name')}" if isinstance(entry, Mapping) else ""
        if not isinstance(entry, Mapping) or entry.get("use_pickle") is not False or not TENSOR.fullmatch(name):
            raise refuse(f"its record {config!r} names something else than plain tensors")
        found.add(name)
    return found


def load_exported(archive: Path, sha256: str) -> torch.nn.Module:
    """The module of an archive.

    Args:
        sha256: of the archive's bytes, as the registry has it.

    Raises:
        CheckpointError: the archive is another one, or could hold a pickle.
    """
    import torch

    if (found := file_sha256(archive)) != sha256:
        raise CheckpointError(
            f"{archive}: SHA-256 {found}, but {sha256} was registered: the file was changed or damaged. Train the model again."
        )
    check_archive(archive)
    return torch.export.load(archive).module()
