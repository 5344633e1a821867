"""What of a run's folder travels, and what is there when only some of it has."""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from object_store import serving
from raymill.cluster.on_head.attempt import kept_at
from raymill.files import make_private_folder, read_record, replace_file, write_record
from raymill.orchestration.on_ray import mirror, run_files
from raymill.record.events import CheckpointSaved, RunFinished, StepDone, append_event, read_events
from raymill.record.folder import RunFolder, run_folder
from raymill.storage.place import Place
from raymill.tune.folder import NOTHING_DELIVERED, StudyFolder, studies_folder


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
    at_home: dict[Path, Mapping[str, run_files.Stamp]] = {}
    mirror._send([here], Home(), at_home)
    first = at_home[here]
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
    mirror._send([here], Home(), at_home)
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


def run_that_goes_on(folder: RunFolder, num_steps: int) -> Iterator[None]:
    """A run, one change of its folder after the other."""
    make_private_folder(folder.checkpoints)
    folder.command.write_text("{}")
    folder.attempt.write_text("1")
    for step in range(1, num_steps + 1):
        append_event(folder, StepDone(step=step, epoch=0, rows=step, metrics={}))
        yield
        name = f"step-{step}"
        staged = folder.checkpoints / f".stage-{name}"
        staged.mkdir()
        for file in ("a", "checksums.json"):
            (staged / file).write_text(f"{file} of {name}")
        staged.rename(folder.checkpoints / name)
        yield
        replace_file(folder.checkpoints / "latest.json", name)
        shutil.rmtree(folder.checkpoints / f"step-{step - 1}", ignore_errors=True)
        yield
        append_event(folder, CheckpointSaved(step=step, path=f"checkpoints/{name}", best=False))
        yield
    write_record(folder.summary, {"status": "finished"})
    yield
    append_event(folder, RunFinished(best_checkpoint=f"checkpoints/step-{num_steps}", metrics={}))
    yield


class Killed(BaseException):
    """As by SIGKILL."""


@dataclass
class SlowPlace:
    """A place at which the run is further on with each file that comes, and the sender is killed behind one of them."""

    place: Place
    goes_on: Callable[[], None]
    files_left: list[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.place, name)

    def write(self, name: str, file: IO[bytes]) -> None:
        if not self.files_left[0]:
            raise Killed
        self.files_left[0] -= 1
        self.place.write(name, file)
        self.goes_on()


@pytest.mark.parametrize("changes_per_file", [0, 1, 3])
def test_what_came_when_the_sender_was_killed_is_as_the_run_was_at_one_moment(changes_per_file: int, tmp_path: Path) -> None:
    num_steps = 4
    for num_files in range(40):
        here = RunFolder(tmp_path / f"here-{num_files}" / "run-1")
        run, files_left = run_that_goes_on(here, num_steps), [num_files]

        def goes_on(run: Iterator[None] = run) -> None:
            for _ in range(changes_per_file):
                next(run, None)

        class Home(mirror.AtAddress):
            def place(self, name: str, files_left: list[int] = files_left, goes_on: Callable[[], None] = goes_on) -> Place:
                return SlowPlace(super().place(name), goes_on, files_left)  # type: ignore[return-value]

        home, at_home = Home(str(tmp_path / f"kept-{num_files}")), dict[Path, Mapping[str, run_files.Stamp]]()
        with suppress(Killed):
            for _ in run:
                mirror._send([here.path], home, at_home)
            mirror._send([here.path], home, at_home)
        there = RunFolder(tmp_path / f"there-{num_files}" / "run-1")
        files_left[0] = 0
        home.fetch(there.path)
        events = read_events(there.events)[0] if there.events.exists() else []
        saved = [int(one.name.removeprefix("step-")) for one in there.checkpoints.glob("step-*")]
        steps = [event.step for event in events if isinstance(event, StepDone)]
        newest = max(saved, default=0)
        assert steps[:newest] == list(range(1, newest + 1)), "no step before a checkpoint is missing"
        ends = any(isinstance(event, RunFinished) for event in events)
        assert not (ends or there.summary.exists()) or saved == [num_steps], "it is over once all of it is there"
        if (there.checkpoints / "latest.json").exists():
            assert int((there.checkpoints / "latest.json").read_text().removeprefix("step-")) in saved
    assert ends, "behind the last file all of it is there"


def test_events_that_are_held_tell_of_all_steps_before_a_checkpoint_that_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = RunFolder(tmp_path / "run-1")
    run, looked_at = run_that_goes_on(here, 4), run_files._stamp
    next(run)

    def stamp(path: Path) -> run_files.Stamp:
        found = looked_at(path)
        if path == here.events:
            # Once, so that no second look finds it out.
            for _ in range(8):
                next(run)
            monkeypatch.setattr(run_files, "_stamp", looked_at)
        return found

    monkeypatch.setattr(run_files, "_stamp", stamp)
    with run_files.held(here.path) as found:
        saved = max(int(name.split("/")[1].removeprefix("step-")) for name in found if name.endswith(f"/{run_files.WHOLE}"))
        with run_files.open_held(here.path, run_files.EVENTS) as file:
            told = [json.loads(line) for line in file]
    assert saved == 2
    assert [event["step"] for event in told if event["kind"] == "step"][:saved] == [1, 2]


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


def add_trial(study: StudyFolder, number: int) -> None:
    """What a search leaves of a trial: its run, a row of the study's store, a line."""
    for _ in run_that_goes_on(run_folder(f"{study.name}-{number:04d}"), 2):
        pass
    with closing(sqlite3.connect(study.store)) as store, store:
        store.execute("create table if not exists trials (number)")
        store.execute("insert into trials values (?)", [number])
    with study.trials.open("a") as file:
        file.write(json.dumps({"number": number}) + "\n")


def test_a_search_is_kept_with_its_runs_and_had_from_there_on_a_new_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = mirror.AtAddress(str(tmp_path / "kept"))

    def on_disk(name: str) -> StudyFolder:
        monkeypatch.setenv("RAYMILL_HOME", str(tmp_path / name))
        return StudyFolder(studies_folder() / "s-1")

    def known(study: StudyFolder) -> list[int]:
        with closing(sqlite3.connect(study.store)) as store:
            found = [number for (number,) in store.execute("select number from trials order by number")]
        assert [json.loads(line)["number"] for line in study.trials.read_text().splitlines()] == found
        assert [run.run_id for run in study.runs] == [f"s-1-{number:04d}" for number in found]
        for run in study.runs:
            assert isinstance(read_events(run.events)[0][-1], RunFinished)
            assert (run.checkpoints / "latest.json").read_text() == "step-2"
        return found

    study = on_disk("a")
    study.path.mkdir(parents=True)
    with kept_at(study, home):
        write_record(study.record, {})
        while home.read("s-1", study.record.name) is None:
            time.sleep(mirror.POLL_S)
        add_trial(study, 0)
        # Both are there while the search goes on.
        while home.read("s-1", study.trials.name) is None:
            time.sleep(mirror.POLL_S)
        assert home.read("s-1-0000", "summary.json") is not None
        add_trial(study, 1)
    study = on_disk("b")
    with kept_at(study, home):
        assert known(study) == [0, 1]
        assert read_record(study.delivered) == NOTHING_DELIVERED
        add_trial(study, 2)
    # The first disk is back, and behind.
    study = on_disk("a")
    with kept_at(study, home):
        assert known(study) == [0, 1, 2]


def test_a_count_tells_of_no_more_than_the_store_that_is_held_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path))
    study = StudyFolder(studies_folder() / "s-1")
    study.path.mkdir(parents=True)
    add_trial(study, 0)
    looked_at, numbers = run_files.stamps, itertools.count(1)

    def stamps(folder: Path) -> dict[str, run_files.Stamp]:
        found = looked_at(folder)
        add_trial(study, next(numbers))
        return found

    monkeypatch.setattr(run_files, "stamps", stamps)
    with run_files.held(study.path):
        with run_files.open_held(study.path, study.trials.name) as file:
            assert file.read().count(b"\n") == 1
        with closing(sqlite3.connect(study.path / run_files.HELD / study.store.name)) as store:
            assert store.execute("select count(*) from trials").fetchone() == (2,)


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
