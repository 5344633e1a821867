"""Runs on a machine that does not see their folders: kept in a folder there, and sent home whenever a checkpoint is saved.

What is sent is what differs, by size and time, from what was sent last, checkpoints behind all else: whoever goes on from what
came home finds what a process that was killed there would have left.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill.files import make_private_folder, replace_file
from raymill.orchestration.on_ray.session_folder import end_session, new_session, remove_stale_sessions
from raymill.record.folder import RunFolder, run_folder

if TYPE_CHECKING:
    import numpy as np

    Content = Mapping[str, np.ndarray]
    """Path in a run's folder -> bytes, which Ray does not copy as numbers."""

POLL_S = 0.5

Stamp = tuple[int, int]
"""Size and time of change of a file."""


class HomeActor:
    """Reads and writes folders of runs for those who do not see them. An actor on the driver's machine, see `start_home`."""

    def fetch(self, run_id: str) -> dict[str, np.ndarray]:
        """All that there is of a run; nothing, where it is new."""
        return read(run_folder(run_id).path, stamps(run_folder(run_id).path))

    def keep(self, run_id: str, changed: Content, names: Sequence[str]) -> None:
        """Make a run's folder one of these files."""
        write(run_folder(run_id).path, changed, names)


def start_home() -> Any:
    """Start the actor on this machine. It ends with this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(**options)(HomeActor).remote()


@contextmanager
def away() -> Iterator[None]:
    """Within this, the state folder of this process is one of its own, which is removed in the end."""
    remove_stale_sessions()
    before = os.environ.get("RAYMILL_HOME")
    with new_session() as place:
        os.environ["RAYMILL_HOME"] = str(place / "home")
        try:
            yield
        finally:
            if before is not None:
                os.environ["RAYMILL_HOME"] = before
            end_session(place, timeout_s=0)


@contextmanager
def mirrored(run_id: str, home: Any) -> Iterator[None]:
    """Within this, and `away`, a run's folder is here as it is at home, and what becomes of it is sent there."""
    folder = run_folder(run_id)
    fetch(run_id, home)
    sent, over = stamps(folder.path), threading.Event()

    def watch() -> None:
        nonlocal sent
        while not over.wait(POLL_S):
            if _saved(folder) - sent.keys():
                sent = _send(folder, home, sent)

    watching = threading.Thread(target=watch, name="sends the run home", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        _send(folder, home, sent)


def fetch(run_id: str, home: Any) -> None:
    """Have a run's folder here as it is at home."""
    import ray

    content = ray.get(home.fetch.remote(run_id))
    if content:
        write(run_folder(run_id).path, content, list(content))


def _saved(folder: RunFolder) -> set[str]:
    """The checkpoints that there are, each by the file that was written last."""
    return {str(one.relative_to(folder.path)) for one in folder.checkpoints.glob("[!.]*/checksums.json")}


def _send(folder: RunFolder, home: Any, sent: Mapping[str, Stamp]) -> dict[str, Stamp]:
    """Send what is new; returns what is at home then."""
    import ray

    found = stamps(folder.path)
    changed = read(folder.path, {name: stamp for name, stamp in found.items() if sent.get(name) != stamp})
    if changed or sent.keys() - found.keys():
        ray.get(home.keep.remote(folder.run_id, changed, list(found)))
    return found


# ---------------------------------------------------------------- the files


def stamps(folder: Path) -> dict[str, Stamp]:
    """The files of a folder, checkpoints last; one that is being replaced or removed just now may be missing."""
    found: dict[str, Stamp] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        with suppress(FileNotFoundError):
            # What begins with a point is not finished.
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                found[str(name)] = path.stat().st_size, path.stat().st_mtime_ns
    return dict(sorted(found.items(), key=lambda one: (one[0].startswith("checkpoints/"), one[0])))


def read(folder: Path, names: Mapping[str, Stamp]) -> dict[str, np.ndarray]:
    """Their content, in the same order."""
    import numpy as np

    content = {}
    for name in names:
        with suppress(FileNotFoundError):
            content[name] = np.fromfile(folder / name, dtype=np.uint8)
    return content


def write(folder: Path, changed: Content, names: Sequence[str]) -> None:
    """Make a folder one of these files, of which those in `changed` are written."""
    make_private_folder(folder)
    for name, content in changed.items():
        make_private_folder((folder / name).parent)
        replace_file(folder / name, content.tobytes())
    for name in stamps(folder).keys() - set(names):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path, ignore_errors=True)
