"""Models that a job is given, in a project of its own on real Ray: pinned, kept with the run and with what comes of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from integration.commands import PROJECT, Home
from raymill.files import read_record

TEACHER = """\
name: teacher
task: school.code:Teacher
pipeline: school.code:read
optimizer: {kind: SGD, lr: 0.2, momentum: 0.9}
loop: {epochs: 3, global_batch_rows: 12, seed: 3, window_rows: 24}
checkpoint: {metric: validation/loss, mode: min}
register: {model: teacher}
"""

STUDENT = """\
name: student
task: school.pupil:Student
pipeline: school.code:read
inputs: {teacher: teacher@candidate}
optimizer: {kind: SGD, lr: 0.2, momentum: 0.9}
loop: {epochs: 3, global_batch_rows: 12, seed: 3, window_rows: 24}
checkpoint: {metric: validation/loss, mode: min, every_steps: 4}
register: {model: student}
"""

CODE = '''

class Teacher(Teaches):
    """What must be there for a job: a class of this file."""


def read() -> Pipeline:
    """The rows."""
    return pipeline()
'''

PUPIL = '''\
"""The smaller network."""

from __future__ import annotations

from raymill.task import Task
from school import code


class Student(code.Learns, Task):
    """What must be there for a job: a class of this file."""
'''


def make_project(project: Path) -> Path:
    """With a teacher and a student."""
    (project / "school").mkdir(parents=True)
    for name, job in {"teacher": TEACHER, "student": STUDENT}.items():
        (project / "jobs" / name).mkdir(parents=True)
        (project / "jobs" / name / "job.yaml").write_text(job)
    (project / "school" / "code.py").write_text((PROJECT / "tests" / "probes" / "distilled.py").read_text() + CODE)
    (project / "school" / "pupil.py").write_text(PUPIL)
    (project / "school" / "__init__.py").touch()
    (project / "pyproject.toml").write_text('[tool.raymill]\npackages = ["school"]\n')
    return project


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", make_project(tmp_path / "project"))


def test_what_a_name_meant_when_the_run_began_counts_to_its_end_and_beyond(home: Home) -> None:
    teacher = home.json("train", "teacher", "--in-process", "--json")
    whole = home.json("train", "student", "--in-process", "--json", "--set", "register=null")
    fault = {"RAYMILL_FAULT": "step_done:raise:rank=0:step=7", "RAYMILL_FAULT_FOLDER": str(home.scratch)}
    code, _, stderr = home.run("train", "student", "--workers", "1", variables=fault)
    assert code == 1, stderr
    (run,) = (path for path in (home.path / "runs").glob("student-*") if path.name != whole["run_id"])
    pinned = read_record(run / "inputs.json")["inputs"]["teacher"]
    assert (pinned["reference"], pinned["model"], pinned["run_id"]) == ("teacher@candidate", "teacher/1", teacher["run_id"])
    # Another teacher takes over the alias, and the first one is gone.
    home.json("train", "teacher", "--in-process", "--json", "--set", "loop.seed=8")
    shutil.rmtree(home.path / "runs" / teacher["run_id"])
    resumed = home.json("train", "--resume", run.name, "--in-process", "--json")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    # From the student's version alone.
    shutil.rmtree(run)
    measured = home.json("evaluate", "student@candidate", "--json")
    assert measured["metrics"]["validation/loss"] == pytest.approx(resumed["metrics"]["validation/loss"], rel=1e-6)
    other = home.json("train", "student", "--in-process", "--json", "--set", "register=null")
    assert other["weights_sha256"] != whole["weights_sha256"], "the alias names another teacher now"


@pytest.mark.long
def test_code_of_a_model_that_it_is_given_is_code_of_the_run(home: Home) -> None:
    home.json("train", "teacher", "--in-process", "--json")
    task = home.project / "school" / "code.py"
    (home.project / "school" / "apart.py").write_text(task.read_text())
    student = home.project / "jobs" / "student" / "job.yaml"
    (home.project / "school" / "pupil.py").write_text(
        PUPIL.replace("import code", "import apart").replace("code.Learns", "apart.Learns")
    )
    student.write_text(STUDENT.replace("school.code:read", "school.apart:read"))
    fault = {"RAYMILL_FAULT": "step_done:raise:step=7", "RAYMILL_FAULT_FOLDER": str(home.scratch)}
    code, _, _ = home.run("train", "student", "--in-process", variables=fault)
    assert code == 1
    (run,) = (home.path / "runs").glob("student-*")
    task.write_text(task.read_text().replace("nn.ReLU()", "nn.Tanh()"))
    code, _, stderr = home.run("train", "--resume", run.name, "--in-process")
    assert code == 2
    assert "school/code.py: found changed (+1 -1 lines)" in stderr
    # A new run says that the teacher is not as it was trained.
    home.json("train", "student", "--in-process", "--json", "--set", "register=null")
    new = next(path for path in (home.path / "runs").glob("student-*") if path != run)
    assert (
        "whose code was changed since it was trained: school/code.py changed (+1 -1 lines)" in (new / "events.jsonl").read_text()
    )


def test_what_it_cannot_be_given_is_refused_all_at_once(home: Home) -> None:
    teacher = home.json("train", "teacher", "--in-process", "--json")
    wrong = ["--set", "inputs.teacher=techer@candidate", "--set", "inputs.other=teacher/7", "--set", "loop.global_batch_rows=0"]
    code, _, stderr = home.run("check", "student", *wrong)
    assert code == 2
    assert "3 problems" in stderr
    assert "inputs.teacher: found 'techer@candidate'" in stderr
    assert "Did you mean 'teacher@candidate'?" in stderr
    for field, found in {
        "init_from={model: teacher@candidate}": "init_from.model: found weights weight missing, bias missing, 0.bias (32,)",
        f"init_from={{model: {teacher['run_id']}, take: all}}": "a run that has trained on 600 rows, and a job of 600",
        "init_from={model: nobody}": "init_from.model: found 'nobody'",
        "init_from={model: teacher@candidate, hyperparameters: checkpoint}": "hyperparameters goes with take: all",
    }.items():
        code, _, stderr = home.run("train", "student", "--in-process", "--set", field)
        assert (code, found in stderr) == (2, True), stderr
    assert not list((home.path / "runs").glob("student-*")), "no run was made"
    code, _, stderr = home.run("train", "teacher", "--in-process", "--set", "inputs={teacher: teacher/1}")
    assert (code, "a parameter `inputs`" in stderr) == (2, True), stderr
    weights = home.path / "runs" / teacher["run_id"] / teacher["best_checkpoint"] / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    code, _, stderr = home.run("check", "student", "--set", f"inputs.teacher={teacher['run_id']}")
    assert (code, "the file was damaged or changed" in stderr) == (2, True), stderr


@pytest.mark.long
def test_a_run_goes_on_from_where_another_stands(home: Home) -> None:
    first = home.json("train", "teacher", "--in-process", "--json")
    whole = home.json("train", "teacher", "--in-process", "--json", "--set", "loop.epochs=5")
    begin = f"init_from={{model: {first['run_id']}, take: all}}"
    on = home.json("train", "teacher", "--in-process", "--json", "--set", "loop.epochs=5", "--set", begin)
    assert on["weights_sha256"] == whole["weights_sha256"]
    assert on["rows"] == whole["rows"]
    again = f"init_from={{model: {on['run_id']}, take: all}}"
    other = [part for field in ("loop.epochs=9", again, "loop.seed=1") for part in ("--set", field)]
    code, _, stderr = home.run("check", "teacher", *other, "--set", "optimizer={kind: Adam, lr: 0.1}")
    assert (code, "optimizer: found" in stderr, "loop.seed" in stderr) == (2, True, False), "it stands at an epoch's end"
    given = home.json("runs", "show", on["run_id"], "--json")["given"]
    assert given == {"init_from": f"{first['run_id']} (weights {first['weights_sha256'][:12]})"}
