"""A run is trained with the code that it began with: other code is named, and refused where it would train on unseen."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.commands import PROJECT, Home
from raymill.files import read_record
from raymill.orchestration.attempts import committed_step
from raymill.record.events import AttemptStarted, read_events

JOB = ("train", "smoke", "--json", "--set", "checkpoint.every_steps=3")
EDITING_AND_DYING = '''

def edit_and_die(model: nn.Module) -> None:
    """Once: what a user and the kernel may do at the same time."""
    import os, pathlib, signal
    mark = pathlib.Path(os.environ["MARK"])
    model.calls = getattr(model, "calls", 0) + 1
    if model.training and model.calls == 9 and not mark.exists():
        mark.touch()
        with open(__file__, "a") as file:
            file.write("# an edit\\n")
        os.kill(os.getpid(), signal.SIGKILL)
'''


@dataclass(frozen=True)
class Project:
    """A project of its own, whose code can be edited."""

    home: Home
    task: Path

    def edit(self) -> str:
        """Change one line of the task's code; returns what it was."""
        before = self.task.read_text()
        self.task.write_text(before.replace("nn.ReLU()", "nn.Tanh()"))
        assert self.task.read_text() != before
        return before


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "project"
    for folder in ("jobs", "pipelines"):
        shutil.copytree(PROJECT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pyproject.toml").write_text("")
    return Project(Home(tmp_path / "home", root), root / "jobs" / "smoke" / "task.py")


def killed(project: Project) -> str:
    """A run in process that died behind step 7; returns its id."""
    fault = {"RAYMILL_FAULT": "step_done:kill:step=7", "RAYMILL_FAULT_FOLDER": str(project.home.path.parent)}
    assert project.home.run(*JOB, "--in-process", variables=fault)[0] < 0
    return project.home.folder().run_id


def test_a_run_goes_on_with_other_code_only_where_that_is_accepted_and_says_so(project: Project) -> None:
    home, run_id = project.home, killed(project)
    # A save goes on while training does: that of the step before may not have been whole.
    saved = committed_step(home.folder())
    assert saved > 0
    project.edit()
    code, stdout, stderr = home.run("train", "--json", "--resume", run_id, "--in-process")
    assert code == 2
    [problem] = json.loads(stdout)["problems"]
    assert (problem["where"], problem["found"]) == ("jobs/smoke/task.py", "changed (+1 -1 lines)")
    assert f"--resume {run_id} --accept-code-changes" in problem["fix"]
    assert "jobs/smoke/task.py" in stderr

    summary = home.json("train", "--json", "--resume", run_id, "--in-process", "--accept-code-changes")
    assert summary["status"] == "finished"
    [change] = summary["code_changed"]
    assert (change["file"], change["after_step"]) == ("jobs/smoke/task.py", saved)
    start = [event for event in read_events(home.folder().events)[0] if isinstance(event, AttemptStarted)][-1]
    assert f"the code was changed after step {saved}, which was accepted: jobs/smoke/task.py changed (+1 -1 lines)" in start.notes
    shown = home.json("runs", "show", run_id, "--json")
    assert "nn.Tanh()" in Path(shown["code"], "jobs/smoke/task.py").read_text()


@pytest.mark.long
def test_the_same_code_goes_on_without_a_word(project: Project) -> None:
    before = project.edit()
    run_id = killed(project)
    edited = project.task.read_text()
    project.task.write_text(before)
    project.task.write_text(edited)
    summary = project.home.json("train", "--json", "--resume", run_id, "--in-process")
    assert (summary["status"], summary["code_changed"]) == ("finished", [])
    starts = [event for event in read_events(project.home.folder().events)[0] if isinstance(event, AttemptStarted)]
    assert starts[-1].notes == ()


def test_an_evaluation_names_what_has_changed_since_and_a_version_keeps_its_code(project: Project) -> None:
    home = project.home
    trained = home.json(*JOB, "--in-process", "--set", "register={model: blobs}")
    for reference in ("blobs@candidate", trained["run_id"]):
        code, stdout, stderr = home.run("evaluate", reference, "--json")
        assert (code, json.loads(stdout)["code_changed"]) == (0, [])
        assert "note:" not in stderr
    before = project.edit()
    for reference in ("blobs@candidate", trained["run_id"]):
        code, stdout, stderr = home.run("evaluate", reference, "--json")
        assert code == 0, stderr
        assert [change["file"] for change in json.loads(stdout)["code_changed"]] == ["jobs/smoke/task.py"]
        assert "trained with other code than today's" in stderr
        assert "jobs/smoke/task.py changed (+1 -1 lines)" in stderr

    shown = home.json("models", "show", "blobs/1", "--json")
    assert shown["code"] == "models:/blobs/1/extra_files/code"
    assert shown["code_digest"] == read_record(home.folder().code)["digest"]
    (kept,) = (home.path / "artifacts").rglob("extra_files/code/*/jobs/smoke/task.py")
    assert kept.read_text() == before


def test_a_worker_that_starts_again_does_not_train_on_with_code_that_was_edited_meanwhile(project: Project) -> None:
    source = project.task.read_text() + EDITING_AND_DYING
    call = '        return functional.cross_entropy(model(batch["features"]), batch["label"])\n'
    assert source.count(call) == 1
    project.task.write_text(source.replace(call, f"        edit_and_die(model)\n{call}"))
    home, mark = project.home, project.home.path.parent / "mark"
    home.environment["MARK"] = str(mark)
    mark.touch()
    # One worker in process ends with the weights of one on Ray, and each goes on with the other's runs.
    expected = home.json(*JOB, "--in-process")
    mark.unlink()
    shutil.rmtree(home.folder().path)

    code, stdout, stderr = home.run(*JOB, "--workers", "1")
    assert code == 2, stderr
    [problem] = json.loads(stdout)["problems"]
    assert (problem["where"], problem["found"]) == ("jobs/smoke/task.py", "changed")
    run_id = home.folder().run_id
    assert home.json("runs", "show", run_id, "--json")["status"] == "failed"

    project.task.write_text(project.task.read_text().removesuffix("# an edit\n"))
    summary = home.json("train", "--json", "--resume", run_id, "--in-process")
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert (summary["code_changed"], summary["rows"]["used"]) == ([], expected["rows"]["used"])
