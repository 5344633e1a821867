"""Sessions of drivers that died are ended; what only looks like one, or belongs to somebody who lives, is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from raymill.orchestration.on_ray import session_folder
from raymill.orchestration.on_ray.session_folder import (
    DRIVER_LOCK,
    VARIABLE,
    end_session,
    held_by_driver,
    hold,
    new_session,
    remove_stale_sessions,
)
from raymill.record.processes import take_turns_behind

Start = Callable[..., subprocess.Popen[bytes]]
SLEEP = "import sys, time; print('up', flush=True); time.sleep(300)"


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder, of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that lead sessions of their own, and ends them."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(program: str = SLEEP, **variables: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, **variables}, stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def left_behind(folder: Path) -> None:
    """What a supervisor and a driver leave when both are killed."""
    with new_session() as made:
        content = (made / "session.json").read_text()
    made.rename(folder)
    (folder / "session.json").write_text(content)


def ended(process: subprocess.Popen[bytes]) -> bool:
    # Whoever ends it also waits for it, here in the same process; so its exit code may be lost.
    return not psutil.pid_exists(process.pid) or psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE


def test_a_session_is_private_and_has_a_name_that_nobody_can_know_before(scratch: Path) -> None:
    with new_session() as one, new_session() as other:
        assert one != other
        assert one.stat().st_mode & 0o777 == 0o700
        assert one.parent == scratch


def test_what_is_left_of_a_session_without_a_holder_is_ended_and_removed(scratch: Path, start: Start) -> None:
    folder = scratch / "raymill-left"
    left_behind(folder)
    by_variable = start(**{VARIABLE: str(folder)})
    by_file = start(f"log = open({str(folder / 'ray.log')!r}, 'w'); " + SLEEP)
    other = start()
    remove_stale_sessions()
    assert ended(by_variable)
    assert ended(by_file)
    assert not ended(other)
    assert not folder.exists()


def test_a_session_that_its_supervisor_or_its_driver_holds_is_left_alone(scratch: Path, start: Start) -> None:
    with new_session() as supervised:
        remove_stale_sessions()
        assert supervised.is_dir()
    orphaned = scratch / "raymill-orphaned"
    left_behind(orphaned)
    program = f"""
from pathlib import Path
from raymill.orchestration.on_ray.session_folder import hold
with hold(Path({str(orphaned / DRIVER_LOCK)!r})):
    {SLEEP}
"""
    driver = start(program, **{VARIABLE: str(orphaned)})
    remove_stale_sessions()
    assert orphaned.is_dir()
    assert not ended(driver)
    driver.kill()
    driver.wait()
    remove_stale_sessions()
    assert not orphaned.exists()


def forge_mode(folder: Path) -> None:
    folder.chmod(0o755)


def forge_boot(folder: Path) -> None:
    record = json.loads((folder / "session.json").read_text())
    (folder / "session.json").write_text(json.dumps({**record, "boot": "another"}))


def forge_namespace(folder: Path) -> None:
    record = json.loads((folder / "session.json").read_text())
    (folder / "session.json").write_text(json.dumps({**record, "pid_namespace": "pid:[1]"}))


def forge_nothing_inside(folder: Path) -> None:
    (folder / "session.json").unlink()


def forge_deep(folder: Path) -> None:
    (folder / "session.json").write_text("[" * 100_000)


@pytest.mark.parametrize("forge", [forge_mode, forge_boot, forge_namespace, forge_nothing_inside, forge_deep])
def test_a_folder_that_is_not_this_users_here_and_now_ends_nothing(
    scratch: Path, start: Start, forge: Callable[[Path], None]
) -> None:
    folder = scratch / "raymill-forged"
    left_behind(folder)
    forge(folder)
    process = start(**{VARIABLE: str(folder)})
    remove_stale_sessions()
    assert not ended(process)
    assert folder.is_dir()


def test_a_folder_named_after_a_process_ends_no_process(scratch: Path, start: Start) -> None:
    victim = start()
    (scratch / f"raymill-{victim.pid}").mkdir(mode=0o700)
    (scratch / "raymill-link").symlink_to(scratch / f"raymill-{victim.pid}")
    remove_stale_sessions()
    assert not ended(victim)


def test_a_driver_that_outlives_its_supervisor_removes_its_session(scratch: Path) -> None:
    folder = scratch / "raymill-outlived"
    left_behind(folder)
    with held_by_driver(folder):
        assert folder.is_dir()
    assert not folder.exists()
    with new_session() as supervised:
        with held_by_driver(supervised):
            pass
        assert supervised.is_dir()
        end_session(supervised, timeout_s=0)
    assert psutil.pid_exists(os.getpid())
    assert hold is session_folder.hold


def test_the_driver_of_a_search_that_it_was_never_told_removes_its_session(scratch: Path) -> None:
    driver = [sys.executable, "-P", "-m", "raymill.tune.driver"]
    with new_session() as folder:
        process = subprocess.Popen(driver, env={**os.environ, VARIABLE: str(folder)}, stdin=subprocess.PIPE)
    assert folder.exists()
    process.communicate(timeout=60)
    assert list(scratch.iterdir()) == []


def test_a_process_takes_its_turns_behind_others_and_its_session_too(start: Start) -> None:
    process = start()
    # As Ray's workers are, which start such processes too.
    os.setpriority(os.PRIO_PROCESS, process.pid, 10)
    take_turns_behind(process.pid, 7)
    assert psutil.Process(process.pid).nice() == 17
    group = Path(f"/proc/{process.pid}/autogroup")
    if group.exists():
        assert group.read_text().split()[1:] == ["nice", "7"]
