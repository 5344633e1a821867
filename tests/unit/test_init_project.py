"""A project of one's own holds all that its job needs of the catalogue."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from raymill.config import strict_yaml
from raymill.paths import ENGINE
from raymill.project import init_project

JOBS = sorted(path.parent.name for path in (ENGINE.parents[1] / "jobs").glob("*/job.yaml"))


def imported(file: Path) -> set[str]:
    """The modules of `jobs` and `pipelines` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith(("jobs.", "pipelines."))}


@pytest.mark.parametrize("job", JOBS)
def test_every_job_of_the_catalogue_brings_the_code_and_the_jobs_that_it_needs(job: str, tmp_path: Path) -> None:
    project = tmp_path / "mine"
    init_project(project, job)
    catalogue, copied = ENGINE.parents[1], {file.relative_to(project) for file in project.rglob("*.py")}
    for file in project.rglob("*.py"):
        for name in imported(file):
            path = Path(*name.split(".")).with_suffix(".py")
            assert path in copied or not (catalogue / path).is_file(), f"{file} needs {path}"
    registers = {
        (strict_yaml.parse(file.read_bytes()).value.get("register") or {}).get("model")
        for file in project.glob("jobs/*/job.yaml")
    }
    needed = strict_yaml.parse((project / "jobs" / job / "job.yaml").read_bytes()).value.get("inputs") or {}
    assert {reference.partition("@")[0] for reference in needed.values()} <= registers
    assert job in (project / "README.md").read_text()


def test_a_job_that_is_given_a_model_says_what_to_train_first_and_its_test_does(tmp_path: Path) -> None:
    project = tmp_path / "mine"
    init_project(project, "gan")
    readme, test = (project / "README.md").read_text(), (project / "tests" / "test_gan.py").read_text()
    assert readme.index("raymill train mnist ") < readme.index("raymill train gan")
    assert test.index('raymill.load("mnist"') < test.index('raymill.load("gan"')
    compile(test, "test_gan.py", "exec")
