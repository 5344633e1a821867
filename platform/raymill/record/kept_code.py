"""The job's own code, as a run or a model version keeps it: `code.json` says what it was, `code/DIGEST/` holds the files.

Written when a run begins, and again when it is taken up with other code that somebody has accepted; what was before stays, so
that a run always says which code trained which of its steps. Code that is kept is there to be looked at; nothing ever runs it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from raymill.errors import CheckpointError, Problem, RunError
from raymill.files import STAGE, is_regular_file, make_private_folder, private, read_record, write_record
from raymill.record.environment import versions
from raymill.record.folder import RunFolder
from raymill.redaction import code_holds_secret

RECORD, FOLDER = "code.json", "code"
Code = Mapping[str, bytes]
"""Name -> content of each file; see `config.job_code`."""

MAX_BYTES = 4 * 2**20
ACCEPT = "--accept-code-changes"


class FileChange(BaseModel):
    """How a file of the code differs from what it was.

    Attributes:
        file: its name, see `config.job_code`.
        kind: "changed", "added" or "missing".
        lines_added, lines_removed: None where what it was is not known.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    kind: Literal["changed", "added", "missing"]
    lines_added: int | None = None
    lines_removed: int | None = None

    def __str__(self) -> str:
        lines = "" if self.lines_added is None else f" (+{self.lines_added} -{self.lines_removed} lines)"
        return f"{self.file} {self.kind}{lines}"


class EarlierCode(BaseModel):
    """Code that a run was trained with before, up to a step.

    Attributes:
        digest: None: it is not known.
        kept: where its files are, from the folder of the record; None: nowhere.
        until_step: optimizer steps that were trained with it, and with what was before it.
        changes: what was other in the code that came after it.
    """

    model_config = ConfigDict(frozen=True)

    digest: str | None
    kept: str | None
    until_step: int
    changes: list[FileChange]


class CodeRecord(BaseModel):
    """What stands in `code.json`.

    Attributes:
        digest: SHA-256 over all of the code.
        files: name -> SHA-256 of the file.
        libraries: what it ran with: name -> version.
        kept: where the files are, from the folder of the record; None: nowhere.
        not_kept: name -> why a file was not kept.
        earlier: the code before, oldest first.
    """

    model_config = ConfigDict(frozen=True)

    digest: str
    files: dict[str, str]
    libraries: dict[str, str | None]
    kept: str | None
    not_kept: dict[str, str]
    earlier: list[EarlierCode] = []


def sha256s(code: Code) -> dict[str, str]:
    """Name -> SHA-256 of the file, hex, by name."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(code.items())}


def digest(sums: Mapping[str, str]) -> str:
    """SHA-256, hex, of all names and contents."""
    return hashlib.sha256(json.dumps(dict(sorted(sums.items()))).encode()).hexdigest()


def read(folder: Path) -> CodeRecord | None:
    """What a run or a version says of its code; None: nothing, as it is older than such records.

    Raises:
        CheckpointError: it is damaged.
        InputError: it is of another version of raymill.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        return CodeRecord.model_validate(read_record(path))
    except (OSError, ValueError) as error:
        what = "other values than raymill writes" if isinstance(error, ValidationError) else error
        raise CheckpointError(
            f"{path}: cannot be read: {what}. Restore it; without the file, the code counts as unknown."
        ) from error


def keep(folder: RunFolder, code: Code, step: int) -> None:
    """Keep the code that a run goes on with after this many optimizer steps, unless it is what it has trained with so far."""
    before = read(folder.path)
    sums = sha256s(code)
    if before is not None and before.files == sums:
        return
    earlier = []
    if before is not None:
        changed = changes_since(folder.path, before, code)
        earlier = [*before.earlier, EarlierCode(digest=before.digest, kept=before.kept, until_step=step, changes=changed)]
    elif step:
        earlier = [EarlierCode(digest=None, kept=None, until_step=step, changes=[])]
    not_kept = _not_kept(code)
    kept = _keep_files(folder.path, code, digest(sums), not_kept)
    record = CodeRecord(digest=digest(sums), files=sums, libraries=versions(), kept=kept, not_kept=not_kept, earlier=earlier)
    write_record(folder.code, record.model_dump(mode="json"))


def _not_kept(code: Code) -> dict[str, str]:
    num_bytes = sum(map(len, code.values()))
    if num_bytes > MAX_BYTES:
        return dict.fromkeys(code, f"the code has {num_bytes} bytes in all; at most {MAX_BYTES} are kept")
    return {name: "it holds what looks like a secret" for name, content in code.items() if code_holds_secret(content)}


def _keep_files(folder: Path, code: Code, digest: str, not_kept: Mapping[str, str]) -> str | None:
    if not_kept.keys() >= code.keys():
        return None
    kept = f"{FOLDER}/{digest[:12]}"
    if not (folder / kept).exists():
        staged = folder / FOLDER / f"{STAGE}{digest[:12]}"
        for name, content in code.items():
            if name not in not_kept:
                make_private_folder((staged / name).parent)
                with open(staged / name, "wb", opener=private) as file:
                    file.write(content)
        os.replace(staged, folder / kept)
    return kept


def copy(folder: Path, to: Path) -> None:
    """Lay out elsewhere, as for a model version, what a run keeps of its code."""
    if (folder / RECORD).exists():
        shutil.copyfile(folder / RECORD, to / RECORD)
    if (folder / FOLDER).is_dir():
        shutil.copytree(folder / FOLDER, to / FOLDER)


# ---------------------------------------------------------------- held against today's code


def changes_since(folder: Path, record: CodeRecord, now: Code) -> list[FileChange]:
    """How code differs from what a folder's record says, with lines counted where the files were kept."""
    kept = {}
    for name in record.files:
        relative = PurePosixPath(record.kept or "", name)
        # A record that somebody has changed leads nowhere else.
        inside = record.kept is not None and not relative.is_absolute() and ".." not in relative.parts
        if inside and is_regular_file(folder / relative):
            kept[name] = (folder / relative).read_bytes()
    return changes(record.files, now, kept)


def changes(recorded: Mapping[str, str], now: Code, kept: Mapping[str, bytes] | None = None) -> list[FileChange]:
    """How code differs from what it was.

    Args:
        recorded: name -> SHA-256 of each file that there was.
        kept: name -> content of those whose lines are to be counted.
    """
    found = []
    sums = sha256s(now)
    for name in sorted({*recorded, *now}):
        if recorded.get(name) == sums.get(name):
            continue
        kind: Literal["changed", "added", "missing"] = "changed"
        before, after = (kept or {}).get(name), now.get(name)
        if after is None:
            kind, after = "missing", b""
        elif name not in recorded:
            kind, before = "added", b""
        added, removed = (None, None) if before is None else _count_lines(before, after)
        found.append(FileChange(file=name, kind=kind, lines_added=added, lines_removed=removed))
    return found


def _count_lines(before: bytes, after: bytes) -> tuple[int, int]:
    then, now = (content.decode(errors="replace").splitlines() for content in (before, after))
    lines = list(difflib.unified_diff(then, now, n=0, lineterm=""))[2:]
    return sum(line.startswith("+") for line in lines), sum(line.startswith("-") for line in lines)


def problems(run_id: str, found: list[FileChange]) -> list[Problem]:
    """What is said of code that is not the run's."""
    expected = f"the code that run {run_id} has trained with (see `raymill runs show {run_id}`)"
    fix = f"Undo that and type --resume {run_id}, or accept that the weights will be others: --resume {run_id} {ACCEPT}"
    return [Problem(change.file, str(change).removeprefix(f"{change.file} "), expected, fix) for change in found]


def refuse_to_export(folder: RunFolder, record: CodeRecord, found: list[FileChange]) -> None:
    """Of a run's weights and today's code no model is made if that is not the code that trained them.

    Args:
        found: how today's code differs.

    Raises:
        RunError: names each file that differs.
    """
    if found:
        raise RunError(
            f"the model of run {folder.run_id} was not registered: its code was changed since: {', '.join(map(str, found))}. "
            f"Undo that{f'; it is kept in {folder.path / record.kept}' if record.kept else ''}."
        )


def accepted_changes(folder: Path) -> list[dict[str, Any]]:
    """All changes of code that a run has gone on with, as JSON-ready values, each with the step after which it came."""
    record = read(folder)
    earlier = record.earlier if record else []
    return [{**change.model_dump(), "after_step": one.until_step} for one in earlier for change in one.changes]


def notes(folder: Path) -> list[str]:
    """What people should know of a run's code when an attempt begins."""
    record = read(folder)
    if record is None:
        return []
    found = []
    for earlier in record.earlier:
        if earlier.digest is None:
            found.append(f"the code of the first {earlier.until_step} steps is not known")
        else:
            what = ", ".join(map(str, earlier.changes))
            found.append(f"the code was changed after step {earlier.until_step}, which was accepted: {what}")
    if record.not_kept:
        why = "; ".join(sorted(set(record.not_kept.values())))
        found.append(f"not kept of the code: {', '.join(sorted(record.not_kept)[:5])}: {why}")
    now = versions()
    known = [(name, then, now.get(name)) for name, then in record.libraries.items()]
    others = [f"{name} {then} then, {new} now" for name, then, new in known if then and new and then != new]
    return [*found, *([f"other libraries than when the run began: {', '.join(others)}"] if others else [])]
