"""What lies on a cluster's head for the runs that are submitted to it.

.raymill/submitted/CLUSTER/
    CODE/project, CODE/engine   the project and raymill itself, as they were sent
    queue/                      what the queue's actor imports; acts.lock beside it is held by the one that acts
    ready/JOB.json              what workers that stand ready are told
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raymill.files import make_private_folder, read_record, write_record
from raymill.paths import ENGINE, home

CLUSTER = "RAYMILL_CLUSTER"
"""Environment variable of a cluster's machines: what it is called."""

RUNS_AT = "RAYMILL_RUNS_AT"
"""Environment variable of an attempt: where its run's folder is kept beside this disk."""

QUEUE, READY = "queue", "ready"
CODE = re.compile(r"[0-9a-f]{16}")


def folder(address: str | None = None) -> Path:
    """The folder of a cluster.

    Args:
        address: of the cluster; None: the one that this process belongs to: by the name that its machines give it, if its heads
            come and go at other addresses, else by the address that Ray names.
    """
    named = address or os.environ.get(CLUSTER) or os.environ["RAY_ADDRESS"]
    return home() / "submitted" / named.replace(":", "_")


def code_of(runtime_env: Mapping[str, Any] | None) -> str:
    """A name for the code that is sent with a job, which is the same for the same code; "" where none is."""
    sent = runtime_env or {}
    if "working_dir" not in sent:
        return ""
    return hashlib.sha256(repr([sent["working_dir"], sent.get("py_modules")]).encode()).hexdigest()[:16]


def project_of(code: str) -> Path:
    """The project, as it was sent."""
    return folder() / code / "project"


def engine_of(code: str) -> Path:
    """The folder that raymill is imported from, as it was sent."""
    return folder() / code / "engine"


def put_in_place(code: str, project: Path) -> None:
    """Copy the project and this raymill, unless they are there. It is all there, or not at all."""
    for one in (home(), folder().parent, folder()):
        make_private_folder(one)
    with _code_lock():
        if (folder() / code).is_dir():
            return
        with tempfile.TemporaryDirectory(prefix=".", dir=folder()) as place:
            made = Path(place) / code
            shutil.copytree(project, made / "project")
            shutil.copytree(ENGINE, made / "engine" / ENGINE.name)
            made.rename(folder() / code)


def in_place() -> list[str]:
    """The code that lies here."""
    return [one.name for one in folder().iterdir() if CODE.fullmatch(one.name)]


def _code_lock() -> FileLock:
    return FileLock(folder() / "code.lock", mode=0o600)


def remove_all_but(needed: Callable[[], set[str]]) -> None:
    """Remove the code that `needed` does not name, which is asked while nobody can put any in place."""
    with _code_lock():
        for code in set(in_place()) - needed():
            shutil.rmtree(folder() / code, ignore_errors=True)


# ---------------------------------------------------------------- the queue's actor


def acts_lock() -> FileLock:
    """Held for as long as it lives by the process that acts on the line."""
    return FileLock(folder() / "acts.lock", mode=0o600)


def queue_imports(engine: Path) -> bool:
    """Whether the queue's actor imports the raymill that is in this folder, to the letter."""
    own = folder() / QUEUE
    names = [{str(path.relative_to(place)) for path in place.rglob("*.py")} for place in (own, engine)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(own, engine, sorted(names[0]), shallow=False)[1:])


def somebody_acts() -> bool:
    """Whether the queue's actor lives, found out without asking Ray."""
    try:
        with acts_lock().acquire(blocking=False):
            return False
    except Timeout:
        return True


# ---------------------------------------------------------------- workers that stand ready


def tell_ready(job: str, told: Mapping[str, Any]) -> None:
    """Tell workers that stand ready what to do, once for all."""
    path = _told_file(job)
    if not path.exists():
        make_private_folder(path.parent)
        write_record(path, told)


def told_ready(job: str) -> dict[str, Any] | None:
    """What workers that stand ready were told; None: nothing yet."""
    path = _told_file(job)
    return read_record(path) if path.exists() else None


def forget_ready(job: str) -> None:
    """Remove what workers were told that are gone."""
    _told_file(job).unlink(missing_ok=True)


def _told_file(job: str) -> Path:
    return folder() / READY / f"{job}.json"
