"""A checkpoint is whole or it is not there, whatever byte changes and wherever the writer is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymill import files
from raymill.checkpoint import directory, snapshot
from raymill.checkpoint.async_writer import CheckpointWriter
from raymill.checkpoint.commit import better, clean, commit, to_remove
from raymill.checkpoint.directory import Pointer, find_latest, names, read_pointer, verify
from raymill.checkpoint.snapshot import Snapshot, as_plain, from_plain, weights_sha256
from raymill.errors import CheckpointError
from raymill.files import FORMAT_VERSION

FILES = ["weights.safetensors", "optimizer.safetensors", "state.json", "checksums.json"]


def state(step: int) -> Snapshot:
    weights = {"layer.weight": torch.full((2, 3), float(step)), "layer.count": torch.tensor(step)}
    return Snapshot(weights, {"loss/layer.weight/momentum": torch.ones(2, 3)}, {"step": step, "position": 10 * step})


def save(folder: Path, taken: Snapshot, *, best: bool = False) -> Path:
    """Write one checkpoint, without a pointer to it."""
    name = f"step-{taken.record['step']:08d}.1"
    directory.save(folder, name, snapshot.content(taken, best=best))
    return folder / name


def writer_of(folder: Path, attempt: int = 1, keep: int = 2) -> CheckpointWriter:
    def write(taken: Snapshot, best: bool) -> None:
        commit(folder, attempt, keep, snapshot.content(taken, best=best), best=best)

    return CheckpointWriter(write)


def write(folder: Path, *steps: int, attempt: int = 1, best: int | None = None, keep: int = 10) -> None:
    writer = writer_of(folder, attempt, keep)
    for step in steps:
        writer.save(state(step), best=step == best)
    writer.close()


def latest(folder: Path) -> tuple[str | None, list[str]]:
    notes: list[str] = []
    return find_latest(folder, notes.append), notes


# ---------------------------------------------------------------- one checkpoint


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    expected = state(3)
    expected.weights["half"] = torch.tensor([1.5, float("inf")], dtype=torch.bfloat16)
    expected.weights["empty"] = torch.zeros(0, 4)
    expected.record["metrics"] = {"validation/loss": 0.1 + 0.2}
    found = snapshot.load(save(tmp_path, expected, best=True))
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert found.weights[name].dtype == tensor.dtype
        torch.testing.assert_close(found.weights[name], tensor, rtol=0, atol=0)
    assert found.optimizer.keys() == expected.optimizer.keys()
    assert expected.record.items() <= found.record.items()
    assert found.record["is_best"] is True
    assert found.record["weights_sha256"] == weights_sha256(expected.weights)


def test_a_state_without_optimizer_tensors_is_saved(tmp_path: Path) -> None:
    assert snapshot.load(save(tmp_path, Snapshot(state(3).weights, {}, {"step": 3}))).optimizer == {}


@pytest.mark.parametrize("best", [True, False])
def test_a_snapshot_that_travels_is_written_byte_for_byte_as_at_home(tmp_path: Path, best: bool) -> None:
    taken = state(7)
    packed = snapshot.pack(taken, best=best)
    directory.save(tmp_path / "far", "step-00000007.1", packed.content())
    near, far = save(tmp_path / "near", taken, best=best), tmp_path / "far" / "step-00000007.1"
    assert packed.step == 7
    assert {name: (near / name).read_bytes() for name in FILES} == {name: (far / name).read_bytes() for name in FILES}
    read = directory.read(near)
    assert read == packed
    found = snapshot.unpack(read)
    torch.testing.assert_close([found.weights, found.optimizer], [taken.weights, taken.optimizer], rtol=0, atol=0)
    assert found.record == snapshot.load(near).record


def test_values_that_json_would_change_come_back_as_they_were() -> None:
    values = {
        "tensor": torch.tensor([1.5, 2.0], dtype=torch.float64),
        "betas": (0.9, 0.999),
        "milestones": Counter({3: 1, 5: 2}),
        "by_number": {0: "a", 1: (1, [2, None])},
        "plain": {"flag": True, "name": "x", "rate": 0.1},
    }
    found = from_plain(json.loads(json.dumps(as_plain(values))))
    torch.testing.assert_close(found.pop("tensor"), values.pop("tensor"), rtol=0, atol=0)
    assert found == values
    assert type(found["milestones"]) is Counter
    assert type(found["by_number"][1]) is tuple


def test_a_value_that_only_a_pickle_could_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match="a set in an optimizer's or schedule's state"):
        as_plain({"seen": {1, 2}})


def test_the_hash_of_weights_follows_names_types_shapes_and_values() -> None:
    first = {"a": torch.zeros(2, 2), "b": torch.ones(3)}
    others = [
        {"b": torch.zeros(2, 2), "a": torch.ones(3)},
        {"a": torch.zeros(4), "b": torch.ones(3)},
        {"a": torch.zeros(2, 2, dtype=torch.int32), "b": torch.ones(3)},
        {"a": torch.zeros(2, 2), "b": torch.tensor([1.0, 1.0, 2.0])},
        {"a": torch.zeros(2, 2)},
    ]
    assert weights_sha256(dict(reversed(first.items()))) == weights_sha256(first)
    assert len({weights_sha256(weights) for weights in [first, *others]}) == len(others) + 1


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000001.1" / name
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        if name == "checksums.json" and _says_the_same(content, bytes(changed)):
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
            snapshot.load(path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        snapshot.load(path.parent)


def test_checksums_of_another_version_or_of_other_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, state(1))
    sums = path / "checksums.json"
    record = json.loads(sums.read_text())
    sums.write_text(json.dumps({**record, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(CheckpointError, match=r"checksums\.json: found format_version 3;.* newer raymill"):
        verify(path)
    sums.write_text(json.dumps(record))
    verify(path)
    with pytest.raises(CheckpointError, match=r"names .*'state\.json'.*, not \['weights\.safetensors'\]"):
        verify(path, ["weights.safetensors"])


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
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"\xff\xfe",
        b'{"format_version": 1, "latest": 5, "best": null, "attempt": 1}',
        b'{"format_version": 1, "latest": "step-9.9"}',
        b'{"format_version": 1, "latest": "step-00000001.1", "best": null, "attempt": 1, "moons": 2}',
        b'{"format_version": 99, "latest": "step-00000001.1", "best": null, "attempt": 1}',
        b'{"latest": "step-00000001.1", "best": null, "attempt": 1}',
    ],
)
def test_a_damaged_pointer_is_rebuilt_from_the_checkpoints(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, 1, 2, best=1)
    write(tmp_path, 3, attempt=2)
    pointer = read_pointer(tmp_path)
    assert pointer == Pointer("step-00000003.2", "step-00000001.1", 2)
    (tmp_path / directory.POINTER).write_bytes(content)
    assert read_pointer(tmp_path) == pointer
    name, (note,) = latest(tmp_path)
    assert (name, note.partition(" ")[0]) == ("step-00000003.2", directory.POINTER), "the attempt's notes say so"
    write(tmp_path, 4, 5, attempt=2, keep=1)
    assert names(tmp_path) == ["step-00000001.1", "step-00000005.2"]


def test_a_pointer_to_a_checkpoint_that_is_gone_is_rebuilt(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, best=2)
    shutil.rmtree(tmp_path / "step-00000002.1")
    assert read_pointer(tmp_path) == Pointer("step-00000001.1", None, 1)
    name, (note,) = latest(tmp_path)
    assert (name, note.partition(" ")[0]) == ("step-00000001.1", directory.POINTER)


# ---------------------------------------------------------------- keeping them


def test_a_late_writer_of_an_older_attempt_cannot_move_the_pointer(tmp_path: Path) -> None:
    write(tmp_path, 5, attempt=2)
    late = writer_of(tmp_path, attempt=1)
    late.save(state(9), best=True)
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
    writer = writer_of(blocked)
    writer.save(state(1), best=False)
    with pytest.raises(CheckpointError, match="file"):
        writer.save(state(2), best=False)
    writer.close()


def test_a_commit_says_the_name_of_what_it_has_written(tmp_path: Path) -> None:
    assert commit(tmp_path, 3, 1, snapshot.content(state(38), best=False), best=False) == "step-00000038.3"
    assert names(tmp_path) == ["step-00000038.3"]


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
                commit(folder, 1, 1, snapshot.content(state(3), best=False), best=False)
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
        loaded = snapshot.load(folder / name)
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


def test_a_kill_while_a_checkpoint_replaces_one_of_its_step_leaves_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, 3)
    name = names(tmp_path)[0]
    (tmp_path / name).rename(tmp_path / f"{directory.REPLACED}{name}")
    clean(tmp_path)
    assert latest(tmp_path) == (name, [])
    write(tmp_path, 3)
    shutil.copytree(tmp_path / name, tmp_path / f"{directory.REPLACED}{name}")
    clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", name]
