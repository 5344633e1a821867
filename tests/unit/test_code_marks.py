"""A job names only what says of itself that it is a Task or makes a Pipeline; everything else is never called."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raymill.config.code_lookup import find_code, project_packages
from raymill.errors import InputError

MARKED = """
from __future__ import annotations
from typing import TYPE_CHECKING
import raymill.task
from raymill import task as seams
from raymill.task import Pipeline, Task as Learned
if TYPE_CHECKING:
    from raymill.task import Pipeline as P

class Direct(Learned): ...
class Inherited(Direct): ...
class Dotted(raymill.task.Task): ...
class ThroughModule(seams.Task): ...
class Plain: ...
class Task: ...
class Pretender(Task): ...

def says() -> Pipeline: ...
def says_in_text() -> "raymill.task.Pipeline": ...
def says_for_types() -> P: ...
def says_nothing(): ...
def says_else() -> int: ...
def says_optional() -> Pipeline | None: ...
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for package in ("jobs", "pipelines"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "jobs" / "code.py").write_text(MARKED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["Direct", "Inherited", "Dotted", "ThroughModule"])
def test_a_class_that_derives_from_task_may_be_named(project: Path, name: str) -> None:
    assert find_code(f"jobs.code:{name}", "task", "class", project_packages(project)).kind == "class"


@pytest.mark.parametrize("name", ["says", "says_in_text", "says_for_types"])
def test_a_function_that_is_annotated_to_return_a_pipeline_may_be_named(project: Path, name: str) -> None:
    assert find_code(f"jobs.code:{name}", "pipeline", "function", project_packages(project)).kind == "function"


@pytest.mark.parametrize(
    ("name", "kind", "fix"),
    [
        ("Plain", "class", "class Plain(Task):"),
        ("Pretender", "class", "class Pretender(Task):"),
        ("says_nothing", "function", "def says_nothing(...) -> Pipeline:"),
        ("says_else", "function", "def says_else(...) -> Pipeline:"),
        ("says_optional", "function", "def says_optional(...) -> Pipeline:"),
    ],
)
def test_what_is_not_marked_is_refused_with_what_to_write(project: Path, name: str, kind: str, fix: str) -> None:
    with pytest.raises(InputError) as caught:
        find_code(f"jobs.code:{name}", "task", kind, project_packages(project))
    assert fix in caught.value.problems[0].fix


@pytest.mark.parametrize(
    "source",
    [
        "from raymill.task import Pipeline\ndef f() -> Pipeline: ...\nfrom os import system as f\n",
        "from raymill.task import Pipeline\ndef f() -> Pipeline: ...\nimport os\nf = os.system\n",
        "from raymill.task import Pipeline\ndef f() -> Pipeline: ...\nif 1:\n    from os import system as f\n",
        "from raymill.task import Pipeline\ndef f() -> Pipeline: ...\nfor f in [print]: ...\n",
        "from raymill.task import Pipeline\ndef f() -> Pipeline: ...\nwith open('x') as f: ...\n",
    ],
)
def test_what_a_name_is_bound_to_last_is_what_counts(project: Path, source: str) -> None:
    (project / "jobs" / "rebound.py").write_text(source)
    with pytest.raises(InputError):
        find_code("jobs.rebound:f", "pipeline", "function", project_packages(project))


@pytest.mark.parametrize("verb", ["check", "train"])
def test_no_function_of_the_engine_is_called_for_a_job_that_names_it(project: Path, verb: str) -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        job = project / "jobs" / "job.yaml"
        job.write_text(
            "name: x\ntask: jobs.code:Direct\npipeline: raymill.orchestration.on_ray.session_folder:end_session\n"
            f"data: {{folder: /proc/{victim.pid}/cwd, timeout_s: 0}}\noptimizer: {{kind: SGD, lr: 0.1}}\n"
        )
        done = subprocess.run(
            [sys.executable, "-m", "raymill", verb, str(job)],
            cwd=project,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert "found the package 'raymill'; expected one of jobs, pipelines" in done.stderr
        assert victim.poll() is None
    finally:
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
