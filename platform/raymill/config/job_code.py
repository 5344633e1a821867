"""The job's own code: which files of the project its task and its pipeline reach, and what stands in them.

Found as a job is checked: by reading source, never by importing it. Followed are `import` and `from ... import`, wherever they
stand in a file, within the project's allowed packages alone. What is imported by a name that is put together while the code runs,
and files that the code reads as data, are not seen.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

from raymill.config.code_lookup import Packages, project_packages
from raymill.config.spec import JobSpec
from raymill.paths import project_root


def code_of(*specs: JobSpec) -> dict[str, bytes]:
    """The code of a job as it stands in this project now, and of the models that it is given; see `read_code`."""
    return read_code(_modules(specs), project_packages(project_root()))


def code_when_imported(*specs: JobSpec) -> dict[str, bytes]:
    """The same as it stood when this process first asked, which is to be right after importing it.

    A process imports a module once. What is edited later is not what runs there, and a process may stand by for hours.
    """
    return _first_seen(*_modules(specs))


def _modules(specs: Sequence[JobSpec]) -> list[str]:
    return [path.partition(":")[0] for spec in specs for path in (spec.task, spec.pipeline)]


@cache
def _first_seen(*modules: str) -> dict[str, bytes]:
    return read_code(modules, project_packages(project_root()))


def read_code(modules: Sequence[str], packages: Packages) -> dict[str, bytes]:
    """The files that these modules are and import, and the `__init__` of each package on the way.

    Returns:
        name -> content, by name. A name is the path below the folder that holds the top-level package, which for a project's own
        packages is the project: "jobs/mnist/model.py".
    """
    files: dict[str, bytes] = {}
    left, seen = list(modules), set[str]()
    while left:
        parts = left.pop().split(".")
        for module in (".".join(parts[: count + 1]) for count in range(len(parts))):
            if module in seen:
                continue
            seen.add(module)
            if path := packages.locate(module):
                content = files[_name(module, path)] = path.read_bytes()
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                left += _imported(content, package)
    return dict(sorted(files.items()))


def _name(module: str, path: Path) -> str:
    stem = module.replace(".", "/")
    return f"{stem}/__init__.py" if path.name == "__init__.py" else f"{stem}.py"


def _imported(source: bytes, package: str) -> Iterator[str]:
    """Dotted names that may be modules, of all imports of a file; a file that is not Python has none."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                start = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # from beyond the top: Python will say so
                continue
            yield start
            yield from (f"{start}.{alias.name}" for alias in node.names)
