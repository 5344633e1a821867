"""What of a run's folder travels, and what is there when only some of it has."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from object_store import serving
from raymill.cluster.on_head.attempt import kept_at
from raymill.orchestration.on_ray import mirror
from raymill.record.folder import RunFolder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_sent_is_there_and_what_is_gone_is_gone(tmp_path: Path) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    for name in ("spec.json", "checkpoints/step-3/a", "checkpoints/step-3/checksums.json"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    first = mirror.stamps(here)
    mirror.write(home, mirror.read(here, list(first)), list(first))
    assert content(home) == content(here)

    # The next commit; the one before is removed, and something was half written.
    for name in ("checkpoints/step-6/a", "checkpoints/.stage-step-9/a", "empty"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("" if name == "empty" else name)
    for path in (here / "checkpoints" / "step-3").iterdir():
        path.unlink()
    (here / "spec.json").write_text("another")
    second = mirror.stamps(here)
    changed = [name for name, stamp in second.items() if first.get(name) != stamp]
    assert set(changed) == {"empty", "spec.json", "checkpoints/step-6/a"}
    mirror.write(home, mirror.read(here, changed), list(second))
    assert content(home) == {"spec.json": b"another", "empty": b"", "checkpoints/step-6/a": b"checkpoints/step-6/a"}
    assert not (home / "checkpoints" / "step-3").exists()


@contextmanager
def address(kind: str, tmp_path: Path) -> Iterator[str]:
    """Where runs are kept: a folder, or an object store that fails now and then."""
    if kind == "folder":
        yield str(tmp_path / "kept")
        return
    with serving() as store:
        store.client.create_bucket(Bucket="kept")
        store.fault = lambda number, method, path: "503" if number % 10 == 0 else None
        yield "s3://kept/runs/"
        assert store.faults > 3


def commit(folder: RunFolder, step: int, attempt: int = 1) -> None:
    """What a run leaves: a checkpoint that replaces the one before."""
    made = folder.checkpoints / f"step-{step}"
    made.mkdir(parents=True)
    folder.attempt.write_text(str(attempt))
    for name in ("model.safetensors", "checksums.json"):
        (made / name).write_text(f"{name} of step {step}")
    folder.events.write_text("event " * step)
    for old in folder.checkpoints.iterdir():
        if old != made:
            for path in old.iterdir():
                path.unlink()
            old.rmdir()


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_run_is_kept_at_an_address_and_had_from_there_on_a_new_disk(kind: str, tmp_path: Path) -> None:
    with address(kind, tmp_path) as root:
        home, folder = mirror.AtAddress(root), RunFolder(tmp_path / "a" / "run-1")
        folder.path.mkdir(parents=True)
        commit(folder, 3)
        with kept_at(folder, home):
            # What it has saved is there while it goes on.
            while home.read("run-1", "checkpoints/step-3/checksums.json") is None:
                time.sleep(mirror.POLL_S)
            commit(folder, 6)
        elsewhere = RunFolder(tmp_path / "b" / "run-1")
        with suppress(KeyboardInterrupt), kept_at(elsewhere, home):
            assert content(elsewhere.path) == content(folder.path)
            assert [path.name for path in elsewhere.checkpoints.iterdir()] == ["step-6"]
            commit(elsewhere, 9, attempt=2)
            raise KeyboardInterrupt
        # The first disk is back, and behind; a third one is ahead of what is kept.
        with kept_at(folder, home):
            assert content(folder.path) == content(elsewhere.path)
            commit(folder, 12, attempt=3)
        with kept_at(RunFolder(tmp_path / "c" / "run-1"), home):
            assert content(tmp_path / "c" / "run-1") == content(folder.path)
        assert home.read("run-2", "spec.json") is None


def test_what_cannot_be_kept_is_said_and_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, kept = RunFolder(tmp_path / "run-1"), tmp_path / "kept"
    folder.path.mkdir()

    def run() -> None:
        with kept_at(folder, mirror.AtAddress(str(kept))):
            kept.write_text("a file")
            commit(folder, 3)
            sys.exit(0)

    with pytest.raises(SystemExit, match="0"):
        run()
    assert f"is here alone, in {folder.path}" in capsys.readouterr().err
    # One that cannot be asked may know of more than this disk does.
    with pytest.raises(SystemExit, match="the address where runs are kept"):
        run()


def test_checkpoints_come_behind_all_that_tells_of_them(tmp_path: Path) -> None:
    for name in ("checkpoints/step-3/a", "attempt", "zebra.json", "events.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(mirror.stamps(tmp_path)) == ["events.jsonl", "zebra.json", "checkpoints/step-3/a", "attempt"]


def test_a_file_that_goes_away_in_between_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    assert list(mirror.read(tmp_path, ["gone", "there"])) == ["there"]
