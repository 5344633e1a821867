"""What a run ran with: versions, machine, user, commit. Imports none of the libraries; holds no environment variables."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from raymill.paths import project_root
from raymill.redaction import redact_arguments, redact_text

# ---------------------------------------------------------------- what it ran with


def environment() -> dict[str, Any]:
    """What the run ran with, as JSON-ready values. Imports none of the libraries; holds no environment variables."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "versions": versions(),
        "user": _user(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_branch": _git("rev-parse", "--abbrev-ref", "HEAD"),
        "git_remote": None if (remote := _git("remote", "get-url", "origin")) is None else redact_text(remote),
        "git_dirty": None if (changes := _git("status", "--porcelain")) is None else bool(changes),
        "command": redact_arguments(sys.argv),
    }


def versions() -> dict[str, str | None]:
    """What runs here: name -> version; None: it is not there."""
    return {name: _version(name) for name in ("raymill", "torch", "ray", "mlflow", "numpy", "pyarrow")}


# Each run of a process asks twice, and a package's file of facts is long.
@lru_cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's process may have a number that no name belongs to
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(project_root()), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
