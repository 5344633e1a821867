"""The jobs of a project, as people look for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raymill.config.load import load_job
from raymill.errors import InputError
from raymill.paths import find_project, no_project


def list_jobs() -> list[dict[str, Any]]:
    """The project's jobs by name.

    Returns:
        for the job.yaml at the project's root, if there is one, and that of each folder of jobs/: name (what `find_job` takes:
        the folder's, or "job.yaml"), path (from the project's root), about (the first line of its README.md, else the first
        comment of the job file), card (what the job says of itself, or None), valid, num_problems.

    Raises:
        InputError: outside of a project.
    """
    root = find_project()
    if root is None:
        raise InputError([no_project()])
    found: list[dict[str, Any]] = []
    for path in [*root.glob("job.yaml"), *sorted((root / "jobs").glob("*/job.yaml"))]:
        card, num_problems = None, 0
        try:
            card = load_job(path).spec.card
        except InputError as error:
            num_problems = len(error.problems)
        told = card.model_dump() if card else None
        about = {"about": _about(path), "card": told, "valid": not num_problems, "num_problems": num_problems}
        name = path.name if path.parent == root else path.parent.name
        found.append({"name": name, "path": str(path.relative_to(root)), **about})
    return found


def _about(path: Path) -> str:
    """What the job says of itself in one line; "" when it says nothing."""
    readme = path.with_name("README.md")
    # At the root it speaks of the project.
    source, mark = (readme, "") if readme.is_file() and path.parent != find_project() else (path, "#")
    lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip("# ") for line in lines if line.strip() and line.startswith(mark)), "")
