"""Runs on a machine that does not see their folders: kept in a folder there, and sent home whenever a checkpoint is saved.

Home is another machine's disk, through an actor there, or an address. What is sent is what differs, by size and time, from what
was sent last, checkpoints behind all else: whoever goes on from what came home finds what a process that was killed would have
left.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raymill.orchestration.on_ray import run_files
from raymill.orchestration.on_ray.session_folder import end_session, new_session, remove_stale_sessions
from raymill.record.folder import RunFolder, run_folder
from raymill.storage.find import place_of
from raymill.storage.place import Place

if TYPE_CHECKING:
    import numpy as np

    Content = Mapping[str, np.ndarray]
    """Path in a run's folder -> bytes, which Ray does not copy as numbers."""

POLL_S = 0.5


class Home(Protocol):
    """Where the folder of a run belongs."""

    def fetch(self, folder: Path) -> None:
        """Have a run's folder here as it is there; where there is none, nothing happens."""

    def keep(self, folder: Path, changed: Sequence[str], names: Sequence[str]) -> None:
        """Have it there as it is here.

        Args:
            folder: here; its name is the run's id.
            changed: files that are not yet there, or not as they are here.
            names: all files that there are.
        """


@contextmanager
def mirrored(
    folder: RunFolder, home: Home, *, sent: Mapping[str, run_files.Stamp], say: Callable[[str], None], must_arrive: bool
) -> Iterator[None]:
    """Within this, what becomes of a run's folder is sent home: as it begins, behind each checkpoint, and in the end.

    Args:
        folder: here.
        home: where it belongs.
        sent: what is there as it is here.
        say: is told that something could not be sent; it is tried again.
        must_arrive: whether it is an error if the last of it cannot be sent.

    Raises:
        Exception: what the home raises then.
    """
    over, last = threading.Event(), ""

    def watch() -> None:
        nonlocal sent, last
        while not over.wait(POLL_S):
            begins = not sent and folder.command.exists()
            if not begins and not _saved(folder) - sent.keys():
                continue
            try:
                sent = _send(folder.path, home, sent)
            except Exception as error:  # the home may be away for a while
                if last != (last := f"what run {folder.run_id} has saved could not be sent, trying again: {error}"):
                    say(last)

    watching = threading.Thread(target=watch, name="sends the run home", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        try:
            _send(folder.path, home, sent)
        except OSError as error:
            if must_arrive:
                raise
            say(f"the last of run {folder.run_id} could not be sent, and is here alone, in {folder.path}: {error}")


def _saved(folder: RunFolder) -> set[str]:
    """The checkpoints that there are, each by the file that was written last."""
    return {str(one.relative_to(folder.path)) for one in folder.checkpoints.glob(f"[!.]*/{run_files.WHOLE}")}


def _send(folder: Path, home: Home, sent: Mapping[str, run_files.Stamp]) -> dict[str, run_files.Stamp]:
    """Send what is new; returns what is at home then."""
    with run_files.held(folder) as found:
        # A checkpoint is sent as a whole, or not at all.
        new = {run_files.unit_of(name) for name, stamp in found.items() if sent.get(name) != stamp}
        changed = [name for name in found if run_files.unit_of(name) in new]
        if changed or sent.keys() - found.keys():
            home.keep(folder, changed, list(found))
    return found


# ---------------------------------------------------------------- home is an address


class AtAddress:
    """Home is a folder at an address, with a folder for each run."""

    def __init__(self, root: str) -> None:
        """At this address."""
        self._root = root.rstrip("/")

    def place(self, run_id: str) -> Place:
        """Where a run is."""
        return place_of(f"{self._root}/{run_id}")

    def read(self, run_id: str, name: str) -> bytes | None:
        """A file of a run; None: there is none."""
        try:
            return self.place(run_id).read(name)
        except FileNotFoundError:
            return None

    def fetch(self, folder: Path) -> None:
        """As `Home`."""
        place = self.place(folder.name)
        if names := run_files.without_torn(_names(place)):
            run_files.write(folder, ((name, place.read(name)) for name in names))

    def keep(self, folder: Path, changed: Sequence[str], names: Sequence[str]) -> None:
        """As `Home`."""
        place = self.place(folder.name)
        there = set(_names(place))
        for name in changed:
            if name.endswith(f"/{run_files.WHOLE}") and name in there:
                # One of this name is replaced, and is not whole meanwhile.
                place.remove(name)
        for name in changed:
            with suppress(FileNotFoundError), run_files.open_held(folder, name) as file:
                place.write(name, file)
        for name in reversed(run_files.in_order(there - set(names))):
            place.remove(name)


def _names(place: Place) -> list[str]:
    try:
        return [one.name for one in place.entries("**/*", may_link=False)]
    except FileNotFoundError:
        return []


# ---------------------------------------------------------------- home is another machine


class OtherMachine:
    """Home is the disk of the machine that an actor is on."""

    def __init__(self, actor: Any) -> None:
        """The actor, see `start_home`."""
        self._actor = actor

    def fetch(self, folder: Path) -> None:
        """As `Home`."""
        import ray

        content = ray.get(self._actor.fetch.remote(folder.name))
        if content:
            run_files.write(folder, content.items())

    def keep(self, folder: Path, changed: Sequence[str], names: Sequence[str]) -> None:
        """As `Home`."""
        import ray

        ray.get(self._actor.keep.remote(folder.name, _read(folder, changed), names))


class HomeActor:
    """Reads and writes folders of runs for those who do not see them. An actor on the driver's machine, see `start_home`."""

    def fetch(self, run_id: str) -> dict[str, np.ndarray]:
        """All that there is of a run; nothing, where it is new."""
        path = run_folder(run_id).path
        with run_files.held(path) as found:
            return _read(path, list(found))

    def keep(self, run_id: str, changed: Content, names: Sequence[str]) -> None:
        """Make a run's folder one of these files."""
        run_files.write(run_folder(run_id).path, changed.items())
        run_files.remove_all_but(run_folder(run_id).path, names)


def _read(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The content of files that `held` has, in their order."""
    import numpy as np

    content = {}
    for name in names:
        with suppress(FileNotFoundError), run_files.open_held(folder, name) as file:
            content[name] = np.frombuffer(file.read(), dtype=np.uint8)
    return content


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
