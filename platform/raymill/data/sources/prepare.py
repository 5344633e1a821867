"""Any data set written again as Parquet files of good size: read once, in order, verified, and gone on with where it was killed.

    TO/train/part-00000.parquet ...     files of about 128 MiB, row groups of about 16 MiB
    TO/prepared.json                    of which input, and which of its fragments are in which file

A file is staged, read back, renamed, and only then written down; so whatever was killed is done again from the last file that is
written down, with the same rows in the same files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymill.data.arrow import digest_rows, rows_bytes
from raymill.data.bad_rows import read_good_rows
from raymill.data.manifest import Manifest, SplitManifest
from raymill.data.rows import join, num_rows
from raymill.data.sources.parquet import DIGEST_KEY, ParquetSource, inspect_file, read_footer, write_file
from raymill.errors import DataError, InputError, Problem
from raymill.files import parse_json, replace_file
from raymill.storage.find import place_of
from raymill.task import Pipeline, Rows

RECORD = "prepared.json"

FILE_BYTES, GROUP_BYTES = 128 * 2**20, 16 * 2**20
"""Of values, before they are compressed."""


@dataclass(frozen=True)
class Sizes:
    """How much is written together.

    Attributes:
        file_bytes: of a file, about.
        group_bytes: of a row group, about.
    """

    file_bytes: int = FILE_BYTES
    group_bytes: int = GROUP_BYTES


def prepare(
    pipeline: Pipeline,
    manifest: Manifest,
    to: Path,
    *,
    lenient: bool = False,
    sizes: Sizes | None = None,
    progress: Callable[[str, int], None] = lambda split, rows: None,
) -> dict[str, Any]:
    """Write the rows of all splits, before the transform, as Parquet.

    Args:
        to: a folder that is not there, is empty, or holds what an earlier try of the same has written.
        lenient: leave bad rows out, rather than raise.
        progress: is told split and rows as they are done.

    Returns:
        split -> files, rows, bytes (of the files) and bad_rows (left out).

    Raises:
        InputError: the folder holds something else.
        DataError: rows cannot be read; or what was written is not what was read.
    """
    sizes = sizes or Sizes()
    done = _begun(to, {"input": manifest.digest, "lenient": lenient, "sizes": [sizes.file_bytes, sizes.group_bytes]})
    to.mkdir(parents=True, exist_ok=True)
    replace_file(to / RECORD, json.dumps(done, indent=1))
    for split, known in manifest.splits.items():
        files = done["splits"].setdefault(split, [])
        progress(split, sum(one["rows"] for one in files))
        first = files[-1]["until_fragment"] if files else 0
        for rows, until, num_bad in _parts(pipeline, split, known, first, lenient, sizes.file_bytes):
            if num_rows(rows):
                path = to / split / f"part-{len(files):05d}.parquet"
                size_bytes = _write(path, rows, pipeline, sizes.group_bytes)
                files.append({"rows": num_rows(rows), "bytes": size_bytes, "until_fragment": until, "bad_rows": num_bad})
                replace_file(to / RECORD, json.dumps(done, indent=1))
                progress(split, num_rows(rows))
    return {
        split: {"files": len(files), **{what: sum(one[what] for one in files) for what in ("rows", "bytes", "bad_rows")}}
        for split, files in done["splits"].items()
    }


def _begun(to: Path, what: dict[str, Any]) -> dict[str, Any]:
    """What is written down of an earlier try, or the beginning of one."""
    if not to.exists() or not any(to.iterdir()):
        return {**what, "splits": {}}
    fix = "Name another folder, or delete this one."
    try:
        found = parse_json((to / RECORD).read_bytes())
        same = {name: found[name] for name in what} == what
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError([Problem(str(to), "something else", "an empty folder, or none", fix)]) from None
    if not same:
        raise InputError([Problem(str(to), "what was prepared of other data, or in another way", "the same, or nothing", fix)])
    return dict(found)


def _parts(
    pipeline: Pipeline, split: str, known: SplitManifest, first: int, lenient: bool, file_bytes: int
) -> Iterator[tuple[Rows, int, int]]:
    """The rows of each file, the fragment behind it, and how many bad rows were left out."""
    parts: list[Rows] = []
    num_bytes, num_bad = 0, 0
    for number in range(first, len(known.fragments)):
        rows, bad = read_good_rows(pipeline, split, known.fragments[number], lenient=lenient)
        num_bad += len(bad)
        if num_rows(rows):
            parts.append({name: rows[name] for name in pipeline.schema})
            num_bytes += rows_bytes(parts[-1])
        if num_bytes >= file_bytes or number == len(known.fragments) - 1:
            yield (join(parts) if parts else {}), number + 1, num_bad
            parts, num_bytes, num_bad = [], 0, 0


def _write(path: Path, rows: Rows, pipeline: Pipeline, group_bytes: int) -> int:
    """Write a file and read it back; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.parent / f".{path.name}"
    row_bytes = max(1, rows_bytes(rows) // num_rows(rows))
    write_file(stage, rows, pipeline.schema, max(1, group_bytes // row_bytes))
    source = ParquetSource(str(path.parent), pipeline.schema, stage.name)
    at = place_of(str(path.parent))
    footer = read_footer(at, stage.name)
    fragments, problems = inspect_file(at, stage.name, pipeline.schema)
    if problems:
        raise InputError(problems)
    again = [source.read(fragment) for fragment in fragments]
    recorded = (footer.metadata.metadata or {}).get(DIGEST_KEY.encode(), b"").decode()
    if not recorded == digest_rows(join(again)) == digest_rows(rows):
        raise DataError(
            f"{stage}: what was written is not what was read; the disk or the memory is at fault. Try again elsewhere."
        )
    stage.rename(path)
    return path.stat().st_size
