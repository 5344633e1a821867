"""Which files a job's code is: found by reading source, within the allowed packages, and nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from raymill.config.code_lookup import Packages
from raymill.config.job_code import code_of, code_when_imported, read_code
from raymill.config.spec import JobSpec


def project(root: Path, files: Mapping[str, str]) -> Packages:
    """A project with these files, by their module's path."""
    for name, source in {"jobs/__init__": "", "pipelines/__init__": "", **files}.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return Packages(frozenset({"jobs", "pipelines"}), root)


def reached(root: Path, module: str, files: Mapping[str, str]) -> list[str]:
    """The names of the code that this module is, beside the tops of packages."""
    found = read_code([module], project(root, files))
    return [name for name in found if name not in ("jobs/__init__.py", "pipelines/__init__.py")]


@pytest.mark.parametrize(
    "line",
    [
        "from jobs.mine import net",
        "from jobs.mine.net import Net",
        "import jobs.mine.net",
        "import jobs.mine.net as other",
        "from . import net",
        "from .net import Net",
        "from ..mine.net import Net",
        "def build():\n    from jobs.mine.net import Net",
        "try:\n    import fast\nexcept ImportError:\n    from .net import Net",
    ],
)
def test_what_a_module_imports_belongs_to_the_code_however_it_says_so(tmp_path: Path, line: str) -> None:
    files = {"jobs/mine/task": line, "jobs/mine/net": "raise SystemExit('imported')", "jobs/other": ""}
    assert reached(tmp_path, "jobs.mine.task", files) == ["jobs/mine/net.py", "jobs/mine/task.py"]


def test_imports_are_followed_as_far_as_the_allowed_packages_reach(tmp_path: Path) -> None:
    files = {
        "jobs/mine/task": "import os, torch, stranger\nfrom pipelines.rows import read",
        "pipelines/rows": "from jobs.mine import task\nfrom pipelines.deep import deeper",
        "pipelines/deep/deeper": "import stranger",
        "stranger": "",
    }
    expected = ["jobs/mine/task.py", "pipelines/deep/deeper.py", "pipelines/rows.py"]
    assert reached(tmp_path, "jobs.mine.task", files) == expected
    assert reached(tmp_path, "stranger", files) == []
    assert reached(tmp_path, "os.path", files) == []


def test_the_init_of_each_package_on_the_way_runs_too(tmp_path: Path) -> None:
    files = {"jobs/mine/__init__": "from . import more", "jobs/mine/more": "", "jobs/mine/task": ""}
    found = read_code(["jobs.mine.task"], project(tmp_path, files))
    assert list(found) == ["jobs/__init__.py", "jobs/mine/__init__.py", "jobs/mine/more.py", "jobs/mine/task.py"]
    assert found["jobs/mine/__init__.py"] == b"from . import more"


def test_a_file_that_is_not_python_is_code_that_leads_nowhere(tmp_path: Path) -> None:
    files = {"jobs/task": "from jobs import broken, far", "jobs/broken": "def (", "jobs/far": "from .... import x"}
    assert reached(tmp_path, "jobs.task", files) == ["jobs/broken.py", "jobs/far.py", "jobs/task.py"]


def test_what_a_process_has_imported_stays_the_code_it_saw_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path, {"jobs/mine/task": "width = 8"})
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    spec = JobSpec.model_validate(
        {"name": "mine", "task": "jobs.mine.task:T", "pipeline": "jobs.mine.task:p", "optimizer": {"kind": "SGD"}}
    )
    assert code_when_imported(spec)["jobs/mine/task.py"] == b"width = 8"
    (tmp_path / "jobs" / "mine" / "task.py").write_text("width = 9")
    assert code_when_imported(spec)["jobs/mine/task.py"] == b"width = 8"
    assert code_of(spec)["jobs/mine/task.py"] == b"width = 9"
