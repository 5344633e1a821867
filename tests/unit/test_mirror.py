"""What of a run's folder travels, and what is there when only some of it has."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from object_store import serving
from raymill.cluster.on_head.attempt import kept_at
from raymill.orchestration.on_ray import mirror, run_files
from raymill.record.folder import RunFolder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_what_was_sent_is_there_and_what_is_gone_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Home is another machine, without Ray between."""
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path / "home"))
    here, home = tmp_path / "here" / "run-1", tmp_path / "home" / "runs" / "run-1"
    actor = mirror.HomeActor()

    class Home(mirror.OtherMachine):
        def __init__(self) -> None:
            pass

        def keep(self, folder: Path, changed: Sequence[str], names: Sequence[str]) -> None:
            actor.keep(folder.name, mirror._read(folder, changed), names)

    make(here, "spec.json", "checkpoints/step-3/a", "checkpoints/step-3/checksums.json")
    first = mirror._send(here, Home(), {})
    assert content(home) == content(here)

    # The next commit; the one before is removed, and another is being written.
    make(here, "checkpoints/step-6/a", "checkpoints/step-6/checksums.json", "checkpoints/.stage-step-9/a")
    (here / "empty").touch()
    for path in (here / "checkpoints" / "step-3").iterdir():
        path.unlink()
    (here / "spec.json").write_text("another")
    with run_files.held(here) as second:
        assert {name for name, stamp in second.items() if first.get(name) != stamp} == {
            "empty",
            "spec.json",
            "checkpoints/step-6/a",
            "checkpoints/step-6/checksums.json",
        }
    mirror._send(here, Home(), first)
    assert {name: data for name, data in content(here).items() if ".stage" not in name} == content(home)
    assert not (home / "checkpoints" / "step-3").exists()
    there = actor.fetch("run-1")
    run_files.write(tmp_path / "again", there.items())
    assert content(tmp_path / "again") == content(home)


def test_what_is_removed_while_it_is_sent_comes_whole(tmp_path: Path) -> None:
    make(tmp_path, "checkpoints/step-3/a", "checkpoints/step-3/checksums.json")
    with run_files.held(tmp_path) as found:
        shutil.rmtree(tmp_path / "checkpoints" / "step-3")
        for name in found:
            with run_files.open_held(tmp_path, name) as file:
                assert file.read().decode() == name
    assert content(tmp_path) == {}


def test_a_checkpoint_of_which_not_all_came_is_none(tmp_path: Path) -> None:
    """Whoever sends or fetches it is killed behind any of its files."""
    names = ["events.jsonl", "checkpoints/step-3/a", "checkpoints/step-3/checksums.json", "attempt"]
    make(tmp_path / "here", *names)
    for count in range(len(names) + 1):
        home, folder = mirror.AtAddress(str(tmp_path / "kept")), tmp_path / "there" / f"run-{count}"
        for name in run_files.in_order(names)[:count]:
            make(tmp_path / "kept" / f"run-{count}", name)
        home.fetch(folder)
        assert (folder / "checkpoints" / "step-3").exists() == (count >= 3)
        assert (folder / "checkpoints" / "step-3" / "a").exists() == (count >= 3)

        def killed(count: int = count) -> Iterator[tuple[str, bytes]]:
            yield from ((name, name.encode()) for name in run_files.in_order(names)[:count])
            raise KeyboardInterrupt

        place = tmp_path / "killed" / str(count)
        with suppress(KeyboardInterrupt):
            run_files.write(place, killed())
        assert (place / "attempt").exists() == (count == 4)
        assert (place / "checkpoints" / "step-3").exists() == (count == 4)
        run_files.write(place, ((name, name.encode()) for name in run_files.in_order(names)))
        assert content(place) == content(tmp_path / "here")


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
    make(
        tmp_path,
        "checkpoints/step-3/checksums.json",
        "checkpoints/step-3/z",
        "attempt",
        "zebra.json",
        "events.jsonl",
        "checkpoints/step-9/a",
        "checkpoints/latest.json",
    )
    expected = ["events.jsonl", "zebra.json", "checkpoints/step-3/z", "checkpoints/step-3/checksums.json"]
    expected += ["checkpoints/latest.json", "attempt"]
    assert list(run_files.stamps(tmp_path)) == expected
