"""One source split into several, or with some rows more often than others, without a file being written again: which row is in
which split, and how often, is a pure function of the row.

By share, each row falls by a hash of its place (file, part, number in it) and a seed; by key, by a hash of a column's value, so
that all rows of one user or patient are together. So what is where does not change when files are added, or come in another
order. By time, a row falls by where its value lies between bounds.

A fragment of a split is the fragment of the source, with as many rows as the split has of it; it is read as a whole, and the
split's rows are taken out. Its identity holds the rule, so that a run whose splits were changed is not gone on with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from raymill.data.order import key, splitmix64
from raymill.data.rows import take
from raymill.errors import DataError, InputError, Problem, did_you_mean
from raymill.task import TRAIN, VALIDATION, Column, Fragment, Rows, Source

Hashes = npt.NDArray[np.uint64]
Marks = npt.NDArray[np.int64]
"""Per row the number of its part."""

# ---------------------------------------------------------------- ways to split


def split_by_share(
    source: Source, shares: Mapping[str, float], *, seed: int = 0, stratify: str | None = None
) -> dict[str, SplitSource]:
    """Split rows at random.

    Args:
        source: of all rows.
        shares: split -> its share of the rows; together 1.
        seed: other seeds are other splits.
        stratify: a column of labels; the shares then hold within each label, in each fragment, but for single rows.

    Returns:
        split -> its rows, as a Pipeline takes them.

    Raises:
        InputError: the shares are none, or there is no such column.
    """
    problems = _share_problems(shares) + _column_problems(source, stratify)
    if problems:
        raise InputError(problems)
    return _named(source, Rule(ends=_ends(shares), seed=_salted(seed, source), stratify=stratify), shares)


def split_by_key(source: Source, column: str, shares: Mapping[str, float], *, seed: int = 0) -> dict[str, SplitSource]:
    """Split the values of a column at random: all rows with the same value, such as those of one user, are in the same split.

    Args, returns and errors as those of `split_by_share`; the shares are of the values.
    """
    problems = _share_problems(shares) + _column_problems(source, column)
    if problems:
        raise InputError(problems)
    return _named(source, Rule(column=column, ends=_ends(shares), seed=_salted(seed, source)), shares)


def split_by_time(source: Source, column: str, until: Mapping[str, float | None]) -> dict[str, SplitSource]:
    """Split rows by the value of a column: train on what was, validate on what came after.

    Args:
        source: of all rows.
        column: of numbers, such as a time.
        until: split -> the value from which on a row is in a later one, rising; None for the last split, which has the rest.

    Raises:
        InputError: the bounds do not rise, or there is no such column of numbers.
    """
    problems, bounds = _column_problems(source, column), list(until.values())
    known = [bound for bound in bounds[:-1] if bound is not None]
    if len(bounds) < 2 or bounds[-1] is not None or len(known) < len(bounds) - 1 or sorted(set(known)) != known:
        fix = "Write until={'train': 100, 'validation': 120, 'test': None}."
        problems.append(Problem("until", f"{dict(until)}", "bounds that rise, and None for the last split", fix))
    field = getattr(source, "schema", {}).get(column)
    if field is not None and (field.dtype in ("text", "bytes") or field.shape):
        problems.append(Problem(f"column {column!r}", field.dtype, "a number in each row", "Name a column of times or numbers."))
    if problems:
        raise InputError(problems)
    return _named(source, Rule(column=column, bounds=tuple(map(float, known))), until)


def split_into_folds(
    source: Source, fold: int, num_folds: int, *, seed: int = 0, column: str | None = None
) -> dict[str, SplitSource]:
    """One of the splits of a cross-validation: "validation" is one fold, "train" all others.

    Args:
        source: of all rows.
        fold: 0..num_folds-1.
        num_folds: at least 2.
        seed: other seeds are other folds.
        column: whose values are split, as by `split_by_key`; None: the rows are.

    Raises:
        InputError: there is no such fold, or no such column.
    """
    problems = _column_problems(source, column)
    if not 0 <= fold < num_folds or num_folds < 2:
        fix = "Count folds from 0, and make at least 2."
        problems.append(Problem("fold", f"fold {fold} of {num_folds}", "one of the folds", fix))
    if problems:
        raise InputError(problems)
    ends = tuple((number + 1) / num_folds for number in range(num_folds))
    rule = Rule(column=column, ends=ends, seed=_salted(seed, source))
    others = tuple(number for number in range(num_folds) if number != fold)
    return {TRAIN: SplitSource(source, rule, TRAIN, others), VALIDATION: SplitSource(source, rule, VALIDATION, (fold,))}


def resample(source: Source, column: str, weights: Mapping[Any, float], *, seed: int = 0) -> ResampledSource:
    """The rows of a source, some more often than others: those of a rare label, say.

    A row of weight 2.5 is there twice, and half of such rows a third time; which ones follows from the row and the seed, the same
    in each epoch. Weights below 1 leave rows out. Each copy counts as a row of its own, with its own place in the order.

    Args:
        source: of training rows.
        column: of numbers or texts, that the weights are for.
        weights: value -> how often its rows come; 1 for values that are not named.
        seed: other seeds choose other rows.

    Raises:
        InputError: there is no such column, or a weight is negative, not finite, or above 1,000.
    """
    problems = _column_problems(source, column)
    if wrong := {value: weight for value, weight in weights.items() if not 0 <= weight <= MOST_COPIES}:
        fix = "Write how often a row of that value is to come in an epoch, such as 2.5."
        problems.append(Problem("weights", f"{wrong}", f"numbers from 0 to {MOST_COPIES}", fix))
    if problems:
        raise InputError(problems)
    return ResampledSource(source, column, tuple(weights.items()), seed)


def _named(source: Source, rule: Rule, names: Mapping[str, Any]) -> dict[str, SplitSource]:
    return {name: SplitSource(source, rule, name, (number,)) for number, name in enumerate(names)}


def _salted(seed: int, source: Source) -> int:
    """Of what was split before by the same hashes, a part has few of them: it is split anew by others."""
    return key(seed, int(source.digest, 16)) if isinstance(source, SplitSource) else seed


def _ends(shares: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(np.cumsum(list(shares.values())).tolist())


def _share_problems(shares: Mapping[str, float]) -> list[Problem]:
    fine = all(share > 0 for share in shares.values()) and math.isclose(sum(shares.values()), 1, abs_tol=1e-9)
    fix = "Write shares={'train': 0.8, 'validation': 0.1, 'test': 0.1}."
    return [] if fine else [Problem("shares", f"{dict(shares)}", "positive shares that make 1 together", fix)]


def _column_problems(source: Source, column: str | None) -> list[Problem]:
    schema = getattr(source, "schema", None)
    if column is None or schema is None or column in schema:
        return []
    return [Problem(f"column {column!r}", "no such column", "a column of the source's schema", did_you_mean(column, schema))]


# ---------------------------------------------------------------- which row is where


@dataclass(frozen=True)
class Rule:
    """Which row is in which part.

    Attributes:
        column: that decides; None: the row's place does.
        ends: the share of all hashes up to the end of each part, rising to 1; empty where a part is told by its bound.
        bounds: of each part but the last, the value from which on a row is in a later one.
        seed: other seeds are other parts.
        stratify: the column within each value of which the shares hold.
    """

    column: str | None = None
    ends: tuple[float, ...] = ()
    bounds: tuple[float, ...] = ()
    seed: int = 0
    stratify: str | None = None

    @property
    def reads(self) -> str | None:
        """The column without which nothing can be told."""
        return self.column or self.stratify

    def marks(self, fragment: Fragment, rows: Rows) -> Marks:
        """The part that each row of a fragment is in.

        Args:
            rows: with the column that it reads.
        """
        if self.bounds:
            assert self.column is not None
            values = np.asarray(rows[self.column])
            if (unknown := np.flatnonzero(values != values)).size:  # NaN alone is not itself
                where = f"{fragment.path}, part {fragment.part}, row {unknown[0]}"
                raise DataError(f"{where}: {self.column} is NaN, which is in no split. Correct or drop the row.")
            return np.searchsorted(np.array(self.bounds), values, side="right").astype(np.int64)
        hashes = _hashes_of(rows[self.column], self.seed) if self.column else _hashes_at(fragment, self.seed)
        if self.stratify is None:
            shares = hashes / 2.0**64
        else:
            shares = _shares_within(_hashes_of(rows[self.stratify], self.seed), hashes)
        # A share of 1 is none of the ends, which are rounded.
        return np.minimum(np.searchsorted(np.array(self.ends), shares, side="right"), len(self.ends) - 1).astype(np.int64)


def _hashes_at(fragment: Fragment, seed: int) -> Hashes:
    """Of each row by its place."""
    path = int.from_bytes(hashlib.blake2b(fragment.path.encode(), digest_size=8).digest(), "little")
    return splitmix64(np.arange(fragment.num_rows, dtype=np.uint64) ^ np.uint64(key(path, fragment.part, seed)))


def _hashes_of(column: Column, seed: int) -> Hashes:
    """Of each row by its value: equal ones have equal hashes."""
    if isinstance(column, np.ndarray) and column.ndim == 1:
        # Adding zero makes one of both zeros.
        values = column.astype(np.float64) + 0.0 if column.dtype.kind == "f" else column.astype(np.int64)
        bits = values.view(np.uint64)
        return splitmix64(bits ^ np.uint64(key(seed)))
    known = {value: _digest(value) for value in set(column)}
    return splitmix64(np.array([known[value] for value in column], np.uint64) ^ np.uint64(key(seed)))


def _digest(value: str | bytes) -> int:
    raw = value.encode() if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _shares_within(labels: Hashes, hashes: Hashes) -> npt.NDArray[np.float64]:
    """Where each row stands among those of its label, from 0 to 1, in the order of their hashes.

    All of a label stand at even distances, and the first at a random place (systematic sampling), so that labels with a row or
    two in a fragment are split in the same shares over many.
    """
    order = np.lexsort((hashes, labels))
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.arange(len(labels)) - np.repeat(starts, counts)
    first = splitmix64(hashes[order][starts]) / 2.0**64
    shares = np.empty(len(labels))
    shares[order] = (ranks + np.repeat(first, counts)) / np.repeat(counts, counts)
    return shares


def _reading(source: Source, column: str, whole: Fragment, rows: Rows | None) -> Rows:
    """The column that decides, by the same reading whenever it is asked: what else is bad of a row must not move it.

    Args:
        rows: all columns, where they have been read.
    """
    narrow = _narrowed(source, column)
    return rows if rows is not None and narrow is source else narrow.read(whole)


# ---------------------------------------------------------------- a split


@dataclass(frozen=True)
class SplitSource:
    """The rows of a source that are in a split.

    Attributes:
        source: of all rows.
        rule: which are in which part.
        name: of the split.
        parts: those that it has.
    """

    source: Source
    rule: Rule
    name: str
    parts: tuple[int, ...]

    def fragments(self) -> Sequence[Fragment]:
        """Those of the source that hold rows of the split. Reads the column that decides, where one does.

        Raises:
            InputError: as the source; or that column cannot be read, or the split has no rows.
        """
        whole = self.source.fragments()
        try:
            mine = [self._own(one, int(self._chosen(one).sum())) for one in whole]
        except DataError as error:
            fix = "Restore the file, or split by share, which reads none."
            raise InputError(
                [Problem(f"split {self.name!r}", str(error), f"a readable column {self.rule.reads!r}", fix)]
            ) from error
        if not any(one.num_rows for one in mine):
            found, fix = f"none of {sum(one.num_rows for one in whole)} rows", "Change the rule, or leave the split out."
            if self.rule.bounds:
                found += f"; {self.rule.column} goes from {self._extreme(whole, np.min)} to {self._extreme(whole, np.max)}"
            raise InputError([Problem(f"split {self.name!r}", found, "at least one row", fix)])
        return [one for one in mine if one.num_rows]

    def read(self, fragment: Fragment) -> Rows:
        """The split's rows of a fragment, in its order.

        Raises:
            DataError: as the source; or the fragment was listed by another rule.
        """
        whole = _whole(fragment, self.digest, f"split {self.name!r}")
        rows = self.source.read(whole)
        return take(rows, np.flatnonzero(self._chosen(whole, rows)))

    def _extreme(self, whole: Sequence[Fragment], of: Callable[..., Any]) -> Any:
        """The smallest or the largest value of the column that decides."""
        column = self.rule.column or ""
        return of([of(np.asarray(_narrowed(self.source, column).read(one)[column])) for one in whole])

    def _own(self, whole: Fragment, count: int) -> Fragment:
        return _of_rule(whole, count, self.digest)

    @property
    def digest(self) -> str:
        """16 hex digits that change when the rule does."""
        rule = json.dumps([dataclasses.asdict(self.rule), self.parts])
        return hashlib.sha256(rule.encode()).hexdigest()[:16]

    def _chosen(self, whole: Fragment, rows: Rows | None = None) -> npt.NDArray[np.bool_]:
        """Which rows of a fragment are the split's."""
        known: Rows = {}
        if self.rule.reads is not None:
            known = _reading(self.source, self.rule.reads, whole, rows)
        return np.isin(self.rule.marks(whole, known), self.parts)


# ---------------------------------------------------------------- rows that come more often


MOST_COPIES = 1000


@dataclass(frozen=True)
class ResampledSource:
    """The rows of a source, some more often than others; see `resample`.

    Attributes:
        source: of all rows.
        column: that the weights are for.
        weights: value and weight of each value that is named.
        seed: other seeds choose other rows.
    """

    source: Source
    column: str
    weights: tuple[tuple[Any, float], ...]
    seed: int

    def fragments(self) -> Sequence[Fragment]:
        """Those of the source, with as many rows as there are copies. Reads the column.

        Raises:
            InputError: as the source; or the column cannot be read, or no row is left.
        """
        whole = self.source.fragments()
        try:
            counted = [_of_rule(one, int(self._copies(one).sum()), self._digest) for one in whole]
        except DataError as error:
            where, fix = f"column {self.column!r}", "Restore the file."
            raise InputError([Problem(where, str(error), "a readable column", fix)]) from error
        if not any(one.num_rows for one in counted):
            raise InputError([Problem("weights", "no row is left", "at least one row", "Give some value a weight of 1 or more.")])
        return [one for one in counted if one.num_rows]

    def read(self, fragment: Fragment) -> Rows:
        """The rows of a fragment, in its order, copies beside each other.

        Raises:
            DataError: as the source; or the fragment was listed with other weights.
        """
        whole = _whole(fragment, self._digest, "resampling")
        rows = self.source.read(whole)
        return take(rows, np.repeat(np.arange(whole.num_rows), self._copies(whole, rows)))

    @property
    def _digest(self) -> str:
        """16 hex digits that change when the rule does."""
        return hashlib.sha256(repr((self.column, self.weights, self.seed)).encode()).hexdigest()[:16]

    def _copies(self, whole: Fragment, rows: Rows | None = None) -> npt.NDArray[np.int64]:
        known, weights = _reading(self.source, self.column, whole, rows)[self.column], dict(self.weights)
        values = known.tolist() if isinstance(known, np.ndarray) else known
        wanted = np.array([weights.get(value, 1.0) for value in values], np.float64)
        return (wanted + _hashes_at(whole, self.seed) / 2.0**64).astype(np.int64)


# ---------------------------------------------------------------- what both are made of


def _of_rule(whole: Fragment, count: int, digest: str) -> Fragment:
    """A source's fragment with the rows that a rule leaves of it."""
    return replace(whole, num_rows=count, identity=f"{whole.identity} {whole.num_rows} {digest}")


def _whole(fragment: Fragment, digest: str, what: str) -> Fragment:
    """The source's fragment that `_of_rule` was given.

    Raises:
        DataError: it was by another rule.
    """
    identity, num_rows, made_by = fragment.identity.rsplit(" ", 2)
    if made_by != digest:
        where = f"{fragment.path}, part {fragment.part}"
        raise DataError(f"{where}: {what} was made by another rule when the run began. Start a new run.")
    return replace(fragment, identity=identity, num_rows=int(num_rows))


def _narrowed(source: Source, column: str) -> Source:
    """The source with this column alone, where it can do without the others."""
    schema = getattr(source, "schema", None)
    given = dataclasses.is_dataclass(source) and "schema" in {field.name for field in dataclasses.fields(source)}
    if not given or not isinstance(schema, Mapping) or len(schema) == 1:
        return source
    narrow: Source = replace(cast(Any, source), schema={column: schema[column]})
    return narrow
