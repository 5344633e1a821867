"""What lies on a cluster's head: code is put in place once and whole, and what workers are told stays as it was said first."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raymill.cluster.on_head import head

SENT = {"working_dir": "gcs://_ray_pkg_1.zip", "py_modules": ["gcs://_ray_pkg_2.zip"]}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    return tmp_path / "home"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project" / "jobs").mkdir(parents=True)
    (tmp_path / "project" / "jobs" / "job.yaml").write_text("name: a")
    return tmp_path / "project"


def test_the_same_code_has_the_same_name_and_what_sends_none_has_none() -> None:
    name = head.code_of(SENT)
    assert head.CODE.fullmatch(name)
    assert head.code_of({**SENT, "env_vars": {"A": "1"}}) == name
    others = [{**SENT, "working_dir": "gcs://_ray_pkg_3.zip"}, {**SENT, "py_modules": []}, {"working_dir": SENT["working_dir"]}]
    assert len({name, *map(head.code_of, others)}) == 4
    assert [head.code_of(one) for one in (None, {}, {"py_modules": SENT["py_modules"]})] == ["", "", ""]


def test_code_is_put_in_place_once_and_removed_when_nobody_needs_it(home: Path, project: Path) -> None:
    names = ["a" * 16, "b" * 16]
    for name in names:
        head.put_in_place(name, project)
    assert (head.project_of(names[0]) / "jobs" / "job.yaml").read_text() == "name: a"
    assert (head.engine_of(names[0]) / "raymill" / "cluster" / "line.py").is_file()
    assert head.folder() == home / "submitted" / "127.0.0.1_6379"
    assert head.folder().stat().st_mode & 0o077 == 0
    # Somebody runs it: it stays as it is.
    (project / "jobs" / "job.yaml").write_text("name: b")
    head.put_in_place(names[0], project)
    assert (head.project_of(names[0]) / "jobs" / "job.yaml").read_text() == "name: a"
    head.tell_ready("run-ready", {"run": "a"})
    head.remove_all_but(lambda: {names[1]})
    assert head.in_place() == [names[1]]
    assert head.told_ready("run-ready") is not None, "only code is removed"


def test_another_raymill_than_the_queues_is_told_apart(home: Path, project: Path) -> None:
    head.put_in_place("a" * 16, project)
    engine = head.engine_of("a" * 16)
    assert not head.queue_imports(engine), "there is none yet"
    shutil.copytree(engine, head.folder() / head.QUEUE)
    assert head.queue_imports(engine)
    line = engine / "raymill" / "cluster" / "line.py"
    line.write_text(line.read_text().replace("75", "76"))
    assert not head.queue_imports(engine)
    line.unlink()
    assert not head.queue_imports(engine)


def test_a_cluster_whose_heads_have_other_addresses_is_known_by_its_name(
    home: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(head.CLUSTER, "mine")
    head.put_in_place("a" * 16, project)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert head.in_place() == ["a" * 16]
    assert head.folder() == home / "submitted" / "mine"
    assert head.folder("10.0.0.2:6379") != head.folder()


def test_code_that_could_not_be_copied_whole_is_not_there(project: Path) -> None:
    (project / "gone").symlink_to(project / "nowhere")
    with pytest.raises(Exception, match="gone"):
        head.put_in_place("a" * 16, project)
    assert head.in_place() == []


def test_what_workers_are_told_first_counts(home: Path) -> None:
    assert head.told_ready("a-ready") is None
    head.tell_ready("a-ready", {"run": "b"})
    head.tell_ready("a-ready", {})
    assert head.told_ready("a-ready") == {"run": "b"}
    assert head.told_ready("b-ready") is None
    head.forget_ready("a-ready")
    head.forget_ready("b-ready")
    assert head.told_ready("a-ready") is None


def test_it_is_seen_whether_somebody_acts_on_the_line_and_that_they_have_died(home: Path) -> None:
    head.folder().mkdir(parents=True)
    assert not head.somebody_acts()
    program = "import time; from raymill.cluster.on_head import head\nwith head.acts_lock(): print(flush=True); time.sleep(60)"
    acting = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert acting.stdout is not None
    acting.stdout.readline()
    assert head.somebody_acts()
    acting.kill()
    acting.communicate()
    assert not head.somebody_acts()
