"""A project of one's own: `raymill init` copies a job of the catalogue, with the data code that it needs, into a new folder.

The catalogue is a project like any other; the wheel carries its files as data, under `raymill/catalogue`, and in a checkout of
raymill they are `jobs/` and `pipelines/` at its root. The new project has packages named `jobs` and `pipelines` of its own.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any

from raymill.config import strict_yaml
from raymill.config.spec import NAME
from raymill.errors import InputError, Problem, did_you_mean
from raymill.files import STAGE
from raymill.paths import ENGINE

DEMO = "demo"
"""The job that `raymill init` makes unless told otherwise: the catalogue's `smoke`."""

OF_VISION = re.compile(r"^\s*(?:from|import) (?:torchvision|torchmetrics|sklearn)\b", re.MULTILINE)
"""What raymill's extra of that name installs."""

PYPROJECT = """\
[project]
name = "{name}"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["raymill{extra}", "pytest"]

[tool.raymill]
# Packages beside `jobs` and `pipelines` that a job's `task:` and `pipeline:` may name.
packages = []

[tool.pytest]
testpaths = ["tests"]
pythonpath = ["."]
"""

README = """\
# {name}

A raymill project. `jobs/` has one folder per job, `pipelines/` the data code that they share.

    raymill data get {job}                 # the data, where the job can fetch them
{first}    raymill check {job}                    # everything that is wrong, before anything starts
    raymill plan {job}                     # every derived number, with its reason
    raymill train {job} --in-process       # one worker in this process: print, breakpoint(), your own traceback
    raymill train {job}                    # on Ray, with the workers that the job file says
    raymill cluster up local               # a Ray cluster on this machine, as cluster/local.yaml says, and then
    raymill submit {job} --follow          # the same on it; it goes on when this terminal is closed
    raymill ui                             # the runs, in MLflow's page
    pytest                                 # the tests of this project

The data: `pipelines/{pipeline}`. The model and the loss: `jobs/{job}/task.py`. The numbers: `jobs/{job}/job.yaml`.
"""

FIRST = "    raymill train {job:<24} # first: the model that this one gives is an input of the next\n"

TEST = '''\
"""The job {job} is right, and trains."""

from pathlib import Path

import raymill

DATA = Path(__file__).parents[1] / ".raymill" / "data"


def test_{identifier}_trains(tmp_path, monkeypatch):
    # The data are the project's (`raymill data get {job}`), the runs are the test's.
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path))
    if DATA.is_dir():
        (tmp_path / "data").symlink_to(DATA)
{first}    run = raymill.load("{job}", loop__epochs=1, register=None).train(in_process=True, quiet=True)
    assert run.status == "finished"
    assert run.summary["rows"]["used"] > 0
'''

TEST_FIRST = "    raymill.load({job!r}, loop__epochs=1).train(in_process=True, quiet=True)\n"

LOCAL = """\
# raymill cluster up local
# Ray nodes as processes on this machine, for what is handed over with `raymill submit`. Needs raymill[cluster].
kind: local
nodes:
  - {num_cpus: 1}
  - {num_cpus: 1}
"""

GITIGNORE = "__pycache__/\n*.py[cod]\n.venv/\n.pytest_cache/\n.raymill/\n"


def init_project(folder: Path, job: str = DEMO) -> dict[str, str]:
    """Make a project in a new or empty folder, whole or not at all.

    Args:
        job: "demo", or the name of a job in the catalogue.

    Returns:
        folder, job, and catalogue_job, which it is a copy of.

    Raises:
        InputError: the folder holds something, its name is no name, or there is no such job.
    """
    catalogue = catalogue_folder()
    template = "smoke" if job == DEMO else job
    known = sorted(path.parent.name for path in (catalogue / "jobs").glob("*/job.yaml"))
    problems = []
    if template not in known:
        problems.append(Problem("--from", repr(job), "a job of the catalogue", did_you_mean(job, [DEMO, *known])))
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            problems.append(Problem(str(folder), "something there already", "a new or empty folder", "Name another one."))
    except OSError as error:  # such as a name that is too long for any file
        found = error.strerror or str(error)
        problems.append(Problem(str(folder), found, "a folder that can be made", "Name another one."))
    if not NAME.fullmatch(folder.resolve().name):
        expected = "letters, digits, '.', '_' or '-', beginning with a letter or digit"
        problems.append(Problem(str(folder), f"the name {folder.resolve().name!r}", expected, "Name another one."))
    if problems:
        raise InputError(problems)
    stage = folder.resolve().with_name(f"{STAGE}{folder.resolve().name}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        _fill(stage, catalogue, template, job, folder.resolve().name)
        if folder.exists():
            folder.rmdir()
        stage.rename(folder.resolve())
    except BaseException:
        shutil.rmtree(stage)
        raise
    return {"folder": str(folder), "job": job, "catalogue_job": template}


def catalogue_folder() -> Path:
    """The folder with the catalogue's `jobs/` and `pipelines/`: in the installed package, or at the root of a checkout."""
    packed = ENGINE / "catalogue"
    return packed if packed.is_dir() else ENGINE.parents[1]


def _fill(project: Path, catalogue: Path, template: str, job: str, name: str) -> None:
    # A job that is given the models of others needs those too.
    given = _givers(catalogue, template)
    for one in [*given, template]:
        _copy_job(project, catalogue, one, to=job if one == template else one)
    pipeline_module = _pipeline_module(_values(catalogue, template))
    for package in ("jobs", "pipelines"):
        (project / package).mkdir(exist_ok=True)
        (project / package / "__init__.py").write_text("")
    if job != template:
        for file in (project / "jobs" / job).rglob("*"):
            if file.suffix in (".py", ".yaml", ".md"):
                text = file.read_text(encoding="utf-8")
                text = re.sub(rf"\bjobs([./]){re.escape(template)}\b", rf"jobs\1{job}", text)
                file.write_text(text.replace(f"name: {template}\n", f"name: {job}\n"), encoding="utf-8")
    code = "".join(file.read_text(encoding="utf-8") for file in project.rglob("*.py"))
    extra = "[vision]" if OF_VISION.search(code) else ""
    (project / "pyproject.toml").write_text(PYPROJECT.format(name=name, extra=extra))
    (project / ".gitignore").write_text(GITIGNORE)
    (project / "cluster").mkdir()
    (project / "cluster" / "local.yaml").write_text(LOCAL)
    pipeline = f"{pipeline_module.partition('.')[2].replace('.', '/')}.py"
    readme = README.format(name=name, job=job, pipeline=pipeline, first="".join(FIRST.format(job=one) for one in given))
    (project / "README.md").write_text(readme)
    (project / "tests").mkdir()
    identifier = "".join(letter if letter.isalnum() else "_" for letter in job)
    first = "".join(TEST_FIRST.format(job=one) for one in given).replace("'", '"')
    (project / "tests" / f"test_{identifier}.py").write_text(TEST.format(job=job, identifier=identifier, first=first))


def _values(catalogue: Path, job: str) -> dict[str, Any]:
    """What a job file of the catalogue says."""
    found: dict[str, Any] = strict_yaml.parse((catalogue / "jobs" / job / "job.yaml").read_bytes()).value
    return found


def _pipeline_module(values: dict[str, Any]) -> str:
    return str(values["pipeline"]).partition(":")[0]


def _givers(catalogue: Path, job: str) -> list[str]:
    """The jobs of the catalogue that register the models that a job is given, in the order to train them in."""
    registers = {
        (_values(catalogue, path.parent.name).get("register") or {}).get("model"): path.parent.name
        for path in sorted((catalogue / "jobs").glob("*/job.yaml"))
    }
    found: list[str] = []
    for reference in (_values(catalogue, job).get("inputs") or {}).values():
        giver = registers[re.split("[@/]", str(reference))[0]]
        found += [one for one in [*_givers(catalogue, giver), giver] if one not in found]
    return found


def _copy_job(project: Path, catalogue: Path, job: str, to: str) -> None:
    """A job's folder, and what its code and its data code need of others."""
    source = catalogue / "jobs" / job
    shutil.copytree(source, project / "jobs" / to, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    own = [f"jobs.{job}.{file.stem}" for file in source.glob("*.py")]
    for file in _needed_files(catalogue, [_pipeline_module(_values(catalogue, job)), *own], but=f"jobs.{job}"):
        target = project / file.relative_to(catalogue)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _needed_files(catalogue: Path, modules: list[str], but: str) -> list[Path]:
    """The files of `pipelines` and of other jobs that these modules need, by reading their imports.

    Args:
        but: a package that is copied whole.
    """
    files: list[Path] = []
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        file = catalogue.joinpath(*name.split(".")).with_suffix(".py")
        if name in seen or not name.startswith(("pipelines.", "jobs.")) or not file.is_file():
            continue
        seen.add(name)
        if not name.startswith(f"{but}."):
            package = file.with_name("__init__.py")
            files += [file, *([package] if package.parent.parent != catalogue and package not in files else [])]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    return files
