"""Rows that are kept once they were read: the same rows, read once, and never those of other data, code or draws."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymill.data.seeds import reading, seed_everything
from raymill.data.sources import ArraySource, MapStyleSource, cached, row_cache
from raymill.data.sources.row_cache import CachedSource
from raymill.errors import InputError
from raymill.paths import home
from raymill.task import Fragment, Rows

FRAGMENT = Fragment("a", 0, 3, 30, "x")


@dataclass(frozen=True)
class Counted:
    """Notes in a file each time that it is read."""

    log: str
    factor: int = 1
    kind: str = "plain"
    seconds: float = 0.0

    def fragments(self) -> Sequence[Fragment]:
        return [FRAGMENT]

    def read(self, fragment: Fragment) -> Rows:
        with open(self.log, "a") as file:
            file.write("read\n")
        time.sleep(self.seconds)
        drawn = {"python": random.random, "numpy": np.random.rand, "torch": torch.rand}
        more = float(drawn[self.kind](*([()] if self.kind == "torch" else []))) if self.kind in drawn else 0.0
        return {
            "flag": np.array([True, False, True]),
            "x": np.arange(6, dtype=np.float32).reshape(3, 2) * self.factor + more,
            "ragged": [np.arange(n, dtype=np.int16) for n in range(3)],
            "text": ["ä", "", "b"],
            "file": [b"1", b"", b"\0"],
        }


def reads(source: CachedSource) -> int:
    inner = source.source
    assert isinstance(inner, Counted)
    return len(Path(inner.log).read_text().splitlines())


def assert_same(one: Rows, other: Rows) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_equal(one[name], other[name])
        assert type(one[name]) is type(other[name])
        if isinstance(one[name], np.ndarray):
            assert np.asarray(one[name]).dtype == np.asarray(other[name]).dtype


@pytest.fixture
def source(tmp_path: Path) -> CachedSource:
    return cached(Counted(str(tmp_path / "log")))


def test_rows_are_read_once_and_come_as_they_were(source: CachedSource) -> None:
    first, again = source.read(FRAGMENT), cached(source.source).read(FRAGMENT)
    assert_same(first, again)
    assert reads(source) == 1
    assert all(column.flags.aligned and not column.flags.writeable for column in again.values() if isinstance(column, np.ndarray))
    assert source.fragments() == [FRAGMENT]


@pytest.mark.parametrize("change", ["arguments", "identity", "code", "library"])
def test_what_may_change_the_rows_is_read_anew(
    source: CachedSource, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    (project / "pipelines").mkdir(parents=True)
    (project / "pipelines" / "a.py").write_text("one = 1\n")
    monkeypatch.setattr(row_cache, "project_root", lambda: project)
    row_cache._of_code_and_libraries.cache_clear()
    cached(source.source).read(FRAGMENT)
    changed, fragment = source.source, FRAGMENT
    if change == "arguments":
        changed = Counted(str(tmp_path / "log"), factor=2)
    elif change == "identity":
        fragment = Fragment("a", 0, 3, 30, "y")
    elif change == "code":
        (project / "pipelines" / "a.py").write_text("one = 2\n")
    else:
        monkeypatch.setattr(row_cache, "version", lambda name: "other")
    row_cache._of_code_and_libraries.cache_clear()
    cached(changed).read(fragment)
    row_cache._of_code_and_libraries.cache_clear()
    assert reads(source) == 2


@pytest.mark.parametrize("kind", ["python", "numpy", "torch"])
def test_what_is_drawn_while_it_is_read_is_not_kept(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = cached(Counted(str(tmp_path / f"log-{kind}"), kind=kind))
    found = []
    for epoch in range(2):
        seed_everything(epoch)
        found.append(np.asarray(source.read(FRAGMENT)["x"])[0, 0])
    assert (reads(source), found[0] != found[1]) == (2, True)


class Dataset:
    """Of items that are the same each time, or not."""

    def __init__(self, kind: str = "plain") -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> float:
        if self.kind == "last" and number < 3:
            return float(number)
        return number + (random.random() if self.kind != "plain" else 0.0)


def item(value: float) -> dict[str, Any]:
    return {"x": np.float64(value)}


@pytest.mark.parametrize(("kind", "kept"), [("plain", True), ("drawn", False), ("last", False)])
def test_a_data_set_that_draws_for_any_of_its_items_is_not_kept(kind: str, kept: bool) -> None:
    source = cached(MapStyleSource("items", partial(Dataset, kind), item, 4))
    (fragment,) = source.fragments()
    values = []
    for epoch in range(2):
        with reading(0, epoch):
            values.append(np.asarray(source.read(fragment)["x"]).tolist())
    assert bool(list(home().glob("cache/rows/*.rows"))) is kept
    assert (values[0] == values[1]) is kept


def numbers() -> Rows:
    return {"x": np.arange(100), "label": np.arange(100) % 2}


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other"])
def test_a_damaged_file_is_said_and_made_again(source: CachedSource, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = source.read(FRAGMENT)
    (path,) = home().glob("cache/rows/*.rows")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes({"flipped": bytes(content), "cut": path.read_bytes()[:40], "empty": b"", "other": b"a" * 200}[damage])
    assert_same(source.read(FRAGMENT), first)
    assert_same(source.read(FRAGMENT), first)
    assert reads(source) == 2
    assert damage == "empty" or "is damaged" in capsys.readouterr().err


def test_beyond_its_limit_or_on_a_full_disk_rows_are_read_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = cached(Counted(str(tmp_path / "log")), most_bytes=10)
    small.read(FRAGMENT)
    small.read(FRAGMENT)
    assert (reads(small), "takes no more rows" in capsys.readouterr().err) == (2, True)

    def full(before: Path, behind: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = cached(Counted(str(tmp_path / "log")))
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        source.read(FRAGMENT)
    assert "No space left" in capsys.readouterr().err
    assert not list(home().glob("cache/rows/*"))


def test_a_source_without_a_digest_is_refused() -> None:
    with pytest.raises(InputError, match="in place of lambdas"):
        cached(ArraySource("rows", lambda: {"x": np.arange(3)}, 3))


@dataclass(frozen=True)
class Made:
    """Of a method, and of all kinds of arguments."""

    read: Any
    given: Any

    def fragments(self) -> Sequence[Fragment]:
        return []


def test_sources_are_told_apart_by_all_that_they_were_given() -> None:
    given: list[Any] = [
        1, 1.0, True, "1", b"1", None, (1,), {"a": 1}, {"a": 2}, {"b": 1}, {"x", "y"}, np.arange(3), np.arange(3.0),
        Path("a"), partial(item, 1), partial(item, 2), partial(numbers), item, numbers, Dataset, Made(item, 1), Made(item, 2),
    ]  # fmt: skip
    digests = [cached(Made(item, one)).digest for one in given]
    # A sequence is one, whether it is a list or a tuple.
    assert len(set(digests)) == len(given)
    assert digests == [cached(Made(item, one)).digest for one in given]
    first, second = Made(item, 1), Made(item, 2)
    assert cached(Made(first.fragments, 0)).digest != cached(Made(second.fragments, 0)).digest


def read_in_a_process(source: CachedSource, state: str) -> None:
    os.environ["RAYMILL_HOME"] = state
    source.read(FRAGMENT)


def test_processes_that_want_the_same_rows_read_them_once(tmp_path: Path) -> None:
    source = cached(Counted(str(tmp_path / "log"), seconds=0.3))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=read_in_a_process, args=(source, str(home()))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert reads(source) == 1
