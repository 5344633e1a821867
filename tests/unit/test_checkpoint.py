"""A checkpoint is whole or it is not there, whatever byte changes and wherever the writer is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymill import files
from raymill.checkpoint import commit, directory
from raymill.checkpoint.async_writer import CheckpointWriter
from raymill.checkpoint.commit import better, clean, to_remove
from raymill.checkpoint.directory import Pointer, find_latest, names, read_pointer, verify
from raymill.checkpoint.snapshot import Snapshot
from raymill.errors import CheckpointError

FILES = ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def snapshot(step: int) -> Snapshot:
    weights = {"layer.weight": torch.full((2, 3), float(step)), "layer.count": torch.tensor(step)}
    return Snapshot(weights, {"loss/layer.weight/momentum": torch.ones(2, 3)}, {"step": step, "position": 10 * step})


def checkpoint_writer(
    folder: Path, attempt: int = 1, keep: int = 2, told: list[dict[str, Any]] | None = None
) -> CheckpointWriter:
    write = partial(commit.commit, folder, attempt, keep)
    return CheckpointWriter(lambda content, best: write(content, best=best), (told if told is not None else []).append)


def write(folder: Path, *steps: int, attempt: int = 1, best: int | None = None, keep: int = 10) -> None:
    saver = checkpoint_writer(folder, attempt, keep)
    for step in steps:
        saver.save(snapshot(step), best=step == best)
    saver.close()


def latest(folder: Path) -> tuple[str | None, list[str]]:
    notes: list[str] = []
    return find_latest(folder, notes.append), notes


# ---------------------------------------------------------------- one checkpoint


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    expected = snapshot(3)
    expected.weights["half"] = torch.tensor([1.5, float("inf")], dtype=torch.bfloat16)
    expected.weights["empty"] = torch.zeros(0, 4)
    expected.record["metrics"] = {"validation/loss": 0.1 + 0.2}
    directory.save(tmp_path, "step-00000003.1", expected, best=True)
    found = directory.load(tmp_path / "step-00000003.1")
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert found.weights[name].dtype == tensor.dtype
        torch.testing.assert_close(found.weights[name], tensor, rtol=0, atol=0)
    assert found.optimizer.keys() == expected.optimizer.keys()
    assert expected.record.items() <= found.record.items()
    assert found.record["is_best"] is True


def test_a_state_without_optimizer_tensors_is_saved(tmp_path: Path) -> None:
    directory.save(tmp_path, "step-00000003.1", Snapshot(snapshot(3).weights, {}, {}), best=False)
    assert directory.load(tmp_path / "step-00000003.1").optimizer == {}


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000001.1" / name
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        if name == "manifest.json" and _says_the_same(content, bytes(changed)):
            continue
        with pytest.raises(CheckpointError):
            verify(path.parent)


def _says_the_same(content: bytes, changed: bytes) -> bool:
    with suppress(ValueError):
        return bool(json.loads(content) == json.loads(changed))
    return False


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_empty_or_missing_file_is_found_and_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000001.1" / name
    content = path.read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=name):
            directory.load(path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        directory.load(path.parent)


# ---------------------------------------------------------------- which one is taken


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") == (None, [])
    assert read_pointer(tmp_path) is None


def test_the_newest_is_taken_by_number_not_by_name(tmp_path: Path) -> None:
    write(tmp_path, 9, 10, attempt=2)
    write(tmp_path, 11, attempt=10)
    assert names(tmp_path) == ["step-00000009.2", "step-00000010.2", "step-00000011.10"]
    assert latest(tmp_path) == ("step-00000011.10", [])


def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    (tmp_path / "step-00000003.1" / "state.json").write_text("{}")
    (tmp_path / "step-00000002.1" / "weights.safetensors").unlink()
    name, notes = latest(tmp_path)
    assert name == "step-00000001.1"
    assert [note.split(":")[0] for note in notes] == [
        "checkpoint step-00000003.1 is passed over",
        "checkpoint step-00000002.1 is passed over",
    ]
    assert "state.json" in notes[0]


def test_if_none_is_whole_the_run_cannot_go_on(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for name in names(tmp_path):
        (tmp_path / name / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of .* is whole"):
        latest(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b'{"latest": 5, "best": null, "attempt": 1}', b'{"latest": "step-9.9"}'],
)
def test_a_damaged_pointer_is_rebuilt_from_the_checkpoints(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, 1, 2, best=1)
    write(tmp_path, 3, attempt=2)
    pointer = read_pointer(tmp_path)
    assert pointer == Pointer("step-00000003.2", "step-00000001.1", 2)
    (tmp_path / directory.POINTER).write_bytes(content)
    assert read_pointer(tmp_path) == pointer
    assert latest(tmp_path) == ("step-00000003.2", [])
    write(tmp_path, 4, 5, attempt=2, keep=1)
    assert names(tmp_path) == ["step-00000001.1", "step-00000005.2"]


def test_a_pointer_to_a_checkpoint_that_is_gone_is_rebuilt(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, best=2)
    shutil.rmtree(tmp_path / "step-00000002.1")
    assert read_pointer(tmp_path) == Pointer("step-00000001.1", None, 1)
    assert latest(tmp_path) == ("step-00000001.1", [])


# ---------------------------------------------------------------- keeping them


def test_a_late_writer_of_an_older_attempt_cannot_move_the_pointer(tmp_path: Path) -> None:
    write(tmp_path, 5, attempt=2)
    late = checkpoint_writer(tmp_path, attempt=1)
    late.save(snapshot(9), best=True)
    with pytest.raises(CheckpointError, match=r"attempt 1 .* after attempt 2 had taken over"):
        late.wait()
    late.close()
    assert read_pointer(tmp_path) == Pointer("step-00000005.2", None, 2)
    assert latest(tmp_path) == ("step-00000005.2", [])
    write(tmp_path, 6, attempt=2)
    assert latest(tmp_path) == ("step-00000006.2", [])


def test_a_failed_save_is_raised_by_the_next_call(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    saver = checkpoint_writer(blocked)
    saver.save(snapshot(1), best=False)
    with pytest.raises(CheckpointError, match="file"):
        saver.save(snapshot(2), best=False)
    saver.close()


def test_each_checkpoint_is_told_of_once_it_is_safe(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    saver = checkpoint_writer(tmp_path, keep=1, told=told)
    for step in (1, 2):
        saver.save(snapshot(step), best=step == 2)
        saver.wait()
        assert (tmp_path / told[-1]["path"].removeprefix("checkpoints/")).is_dir()
    saver.close()
    assert [(event["kind"], event["step"], event["best"]) for event in told] == [
        ("checkpoint", 1, False),
        ("checkpoint", 2, True),
    ]


@given(
    steps=st.lists(st.booleans(), min_size=1, max_size=12),
    keep=st.integers(1, 4),
)
def test_the_best_and_the_newest_are_never_removed(steps: list[bool], keep: int) -> None:
    there: list[str] = []
    best: str | None = None
    for number, is_best in enumerate(steps):
        there.append(f"step-{number:08d}.1")
        best = there[-1] if is_best else best
        removed = to_remove(there, Pointer(there[-1], best, 1), keep)
        there = [name for name in there if name not in removed]
        assert there[-keep:] == [f"step-{n:08d}.1" for n in range(number + 1)][-keep:][-len(there) :]
        assert best is None or best in there
        assert len(there) <= keep + 1


def test_files_on_disk_are_those_that_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, 5, best=2, keep=2)
    assert names(tmp_path) == ["step-00000002.1", "step-00000004.1", "step-00000005.1"]
    assert read_pointer(tmp_path) == Pointer("step-00000005.1", "step-00000002.1", 1)


NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "best", "mode", "expected"),
    [
        (0.5, None, "max", True),
        (0.5, 0.4, "max", True),
        (0.4, 0.4, "max", False),
        (0.5, 0.4, "min", False),
        (0.3, 0.4, "min", True),
        (NAN, None, "max", False),
        (NAN, 0.4, "max", False),
        (NAN, 0.4, "min", False),
        (None, None, "max", False),
    ],
)
def test_what_is_better(value: float | None, best: float | None, mode: Any, expected: bool) -> None:
    assert better(value, best, mode) is expected


# ---------------------------------------------------------------- kills


class Killed(BaseException):
    """The process is gone at this point."""


CALLS = ["fsync", "rename", "replace", "open", "mkdir", "unlink", "rmdir"]


def kill_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Raise at the `number`-th of the system calls that change or flush files, and at every one after it."""
    calls = count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) >= number:
                raise Killed
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        patch.setattr(os, name, counted(getattr(os, name)))


def kills(tmp_path: Path) -> Iterator[tuple[int, Path, bool]]:
    """One folder with two whole checkpoints per moment at which the third one's writer can be killed."""
    start = tmp_path / "start"
    write(start, 1, 2, best=1)
    for number in count():
        folder = tmp_path / f"killed-{number}"
        shutil.copytree(start, folder)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(number, patch)
            try:
                commit.commit(folder, 1, 1, snapshot(3), best=False)
                finished = True
            except Killed:
                finished = False
        yield number, folder, finished
        if finished:
            return


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint_and_the_best(tmp_path: Path) -> None:
    found = []
    for number, folder, finished in kills(tmp_path):
        name, notes = latest(folder)
        assert name is not None
        assert notes == []
        found.append(name)
        loaded = directory.load(folder / name)
        assert loaded.record["step"] == int(name[5:13])
        verify(folder / "step-00000001.1")
        if finished:
            assert name == "step-00000003.1"
            assert number > 8
        # The next attempt cleans up and writes on.
        clean(folder)
        assert not list(folder.glob(f"{files.STAGE}*"))
        write(folder, 4, attempt=2, keep=1)
        assert latest(folder) == ("step-00000004.2", [])
        assert names(folder) == ["step-00000001.1", "step-00000004.2"]
    assert found == sorted(found)
    assert set(found) == {"step-00000002.1", "step-00000003.1"}
