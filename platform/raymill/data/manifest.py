"""The manifest: what a run's input was when the run began.

Taken once, before anything starts, from the indices of all files: every fragment with its rows, bytes and identity.
The order of samples is computed from it, and a resume compares it with what is there then. Only `check_rows` and
`statistics` read rows beyond the first fragment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby, repeat
from typing import Any

from raymill.data.arrow import dtype_problems, schema_problems
from raymill.errors import DataError, InputError, Problem, did_you_mean
from raymill.own_code import seams
from raymill.own_code.seams import FRAGMENTS, READ, Seam
from raymill.own_code.traces import culprit, own_frames
from raymill.task import TRAIN, Fragment, Pipeline, Source


@dataclass(frozen=True)
class SplitManifest:
    """The fragments of one split, in the order of its source."""

    fragments: tuple[Fragment, ...]

    @cached_property
    def num_rows(self) -> int:
        """Rows of all fragments."""
        return sum(fragment.num_rows for fragment in self.fragments)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes that reading all fragments moves."""
        return sum(fragment.num_bytes for fragment in self.fragments)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all fragments in order, hex."""
        return _digest(_split_record(self))


@dataclass(frozen=True)
class Manifest:
    """The input of a run, by split."""

    splits: Mapping[str, SplitManifest]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all splits, hex."""
        return _digest({name: split.digest for name, split in self.splits.items()})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- take


def take_manifest(pipeline: Pipeline, *, lenient: bool = False) -> Manifest:
    """List the fragments of every split, and hold the first one's rows against the pipeline's schema.

    Args:
        lenient: pass over fragments that cannot be read, for jobs that go on without bad rows.

    Raises:
        InputError: with the problems of all splits: what their sources found, no "train", no rows, another schema. What is wrong
            with one column in several files or splits is one problem.
    """
    if unknown := dtype_problems(pipeline.schema):
        raise InputError(unknown)
    problems: list[Problem] = []
    of_splits: list[tuple[str, Problem]] = []
    splits: dict[str, SplitManifest] = {}
    if TRAIN not in pipeline.sources:
        there = f"splits {sorted(pipeline.sources)}"
        problems.append(Problem("pipeline.sources", there, f"a split {TRAIN!r}", f"Add a source named {TRAIN!r}."))
    for name, source in pipeline.sources.items():
        try:
            splits[name] = SplitManifest(tuple(source.fragments()))
        except InputError as error:
            of_splits += [(name, problem) for problem in error.problems]
        except Exception as error:  # the source may be the job's own
            problems.append(_own_problem(FRAGMENTS, error, f"split {name!r}"))
        else:
            of_splits += [(name, problem) for problem in _first_rows_problems(name, source, splits[name], pipeline, lenient)]
    for name in pipeline.targets or ():
        if name not in pipeline.schema:
            fix = did_you_mean(name, pipeline.schema)
            problems.append(Problem("pipeline.targets", repr(name), "a column of the schema", fix))
    # One line of the job's own code may fail for several splits.
    found = [*problems, *_once_per_column(of_splits)]
    if once := {(one.where, one.expected, one.fix): one for one in reversed(found)}:
        raise InputError(list(once.values())[::-1])
    return Manifest(splits)


def _first_rows_problems(name: str, source: Source, split: SplitManifest, pipeline: Pipeline, lenient: bool) -> list[Problem]:
    if not split.num_rows:
        fix = "Give the split rows, or leave it out of the pipeline."
        return [Problem(f"split {name!r}", "0 rows", "at least one row", fix)]
    unreadable: list[Problem] = []
    for fragment in split.fragments if lenient else split.fragments[:1]:
        where = f"split {name!r}, {fragment.path}, part {fragment.part}"
        try:
            return schema_problems(source.read(fragment), pipeline.schema, where)
        except DataError as error:
            unreadable.append(Problem(where, str(error), "readable rows", "Correct or restore the data."))
        except Exception as error:  # the source may be the job's own
            return [_own_problem(READ, error, where)]
    return unreadable


def _own_problem(seam: Seam, error: Exception, at: str) -> Problem:
    """An error of the job's own code; any other is raised again."""
    if not own_frames(culprit(error)):
        raise error
    found = seams.problem(seam, error)
    return replace(found, found=f"{found.found} ({at})")


def _once_per_column(found: list[tuple[str, Problem]]) -> list[Problem]:
    """The problems of (split, problem); what is expected of one column is said once, with all splits in which it is otherwise."""
    alike: dict[tuple[str, ...], list[tuple[str, Problem]]] = {}
    for split, problem in found:
        place, _, column = problem.where.rpartition(": column ")
        same = (column, problem.expected, problem.fix) if place else (split, *problem.as_dict().values())
        alike.setdefault(same, []).append((split, problem))
    return [_merged(several) for several in alike.values()]


def _merged(several: list[tuple[str, Problem]]) -> Problem:
    (_, first), *others = several
    if not others:
        return first
    place, _, column = first.where.rpartition(": column ")
    splits = list(dict.fromkeys(repr(split) for split, _ in several))
    where = f"split{'s' * (len(splits) > 1)} {' and '.join(splits)}: column {column}"
    others_in_words = "another place" if len(others) == 1 else f"{len(others)} other places"
    return replace(first, where=where, found=f"{first.found} in {place}, likewise in {others_in_words}")


# ---------------------------------------------------------------- record


def as_record(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON-ready values, one list per property, repeated strings as [value, times]."""
    return {
        "digest": manifest.digest,
        "splits": {name: _split_record(split) for name, split in manifest.splits.items()},
    }


def from_record(record: Mapping[str, Any]) -> Manifest:
    """The manifest of a record.

    Raises:
        DataError: the record is incomplete, or its contents do not give its digest.
    """
    try:
        splits = {name: _split_from_record(columns) for name, columns in record["splits"].items()}
        manifest = Manifest(splits)
        whole = manifest.digest == record["digest"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"the manifest's record is incomplete ({error!r}). Start a new run.") from error
    if not whole:
        raise DataError("the manifest's record was changed: its digest does not fit its contents. Start a new run.")
    return manifest


def _split_record(split: SplitManifest) -> dict[str, Any]:
    fragments = split.fragments
    return {
        "path": _runs(fragment.path for fragment in fragments),
        "part": [fragment.part for fragment in fragments],
        "num_rows": [fragment.num_rows for fragment in fragments],
        "num_bytes": [fragment.num_bytes for fragment in fragments],
        "identity": _runs(fragment.identity for fragment in fragments),
    }


def _split_from_record(columns: Mapping[str, Any]) -> SplitManifest:
    paths, identities = _unroll(columns["path"]), _unroll(columns["identity"])
    rows = zip(paths, columns["part"], columns["num_rows"], columns["num_bytes"], identities, strict=True)
    return SplitManifest(tuple(Fragment(*row) for row in rows))


def _runs(values: Iterable[str]) -> list[list[Any]]:
    return [[value, sum(1 for _ in group)] for value, group in groupby(values)]


def _unroll(runs: Iterable[list[Any]]) -> Iterable[str]:
    return chain.from_iterable(repeat(value, times) for value, times in runs)


# ---------------------------------------------------------------- compare


def differences(old: Manifest, new: Manifest) -> list[Problem]:
    """What changed in the input since `old` was taken: each file added, removed or changed. Empty when nothing did."""
    problems = []
    for split in sorted({*old.splits, *new.splits}):
        before, after = _by_path(old, split), _by_path(new, split)
        for path in sorted({*before, *after}):
            if before.get(path) != after.get(path):
                where = f"split {split!r}, {path}"
                found, expected = _what(after.get(path)), _what(before.get(path))
                fix = "Restore the input as it was to resume this run, or start a new run."
                problems.append(Problem(where, found, f"{expected}, as when the run began", fix))
    if not problems and old.digest != new.digest:
        fix = "Restore the input as it was to resume this run, or start a new run."
        problems.append(Problem("input", "the same files in another order", "the order when the run began", fix))
    return problems


def _by_path(manifest: Manifest, split: str) -> dict[str, list[Fragment]]:
    found: dict[str, list[Fragment]] = {}
    for fragment in manifest.splits[split].fragments if split in manifest.splits else ():
        found.setdefault(fragment.path, []).append(fragment)
    return found


def _what(fragments: list[Fragment] | None) -> str:
    """A file in words, such as "500 rows in 2 pieces of identity 3f2a..."."""
    if fragments is None:
        return "no such file"
    num_rows = sum(fragment.num_rows for fragment in fragments)
    identities = sorted({fragment.identity for fragment in fragments})
    known = identities[0] if len(identities) == 1 else _digest([fragment.identity for fragment in fragments])[:16]
    return f"{num_rows} rows in {len(fragments)} pieces of identity {known}"
