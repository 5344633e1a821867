"""Runs and searches on a machine that does not see where they belong: kept in folders there, and sent home whenever a checkpoint
is saved or a trial is over.

Home is another machine's disk, through an actor there, or an address. What is sent is what differs, by size and time, from what
was sent last, checkpoints behind all else: whoever goes on from what came home finds what a process that was killed would have
left.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raymill.orchestration.on_ray import run_files
from raymill.orchestration.on_ray.session_folder import end_session, new_session, remove_stale_sessions
from raymill.record.folder import run_folder
from raymill.storage.find import place_of
from raymill.storage.place import Place

if TYPE_CHECKING:
    import numpy as np

    Content = Mapping[str, np.ndarray]
    """Path in a run's folder -> bytes, which Ray does not copy as numbers."""

POLL_S = 0.5


class Home(Protocol):
    """Where the folder of a run, or of a search, belongs."""

    def fetch(self, folder: Path) -> None:
        """Have a folder here as it is there; where there is none, nothing happens."""

    def keep(self, folder: Path, changed: Sequence[str], names: Sequence[str]) -> None:
        """Have it there as it is here.

        Args:
            folder: here; its name is the run's id.
            changed: files that are not yet there, or not as they are here.
            names: all files that there are.
        """


Sent = Mapping[Path, Mapping[str, run_files.Stamp]]
"""Of each folder, what is at home as it is here."""


@contextmanager
def mirrored(
    folders: Callable[[], Sequence[Path]], home: Home, *, sent: Sent, say: Callable[[str], None], must_arrive: bool
) -> Iterator[None]:
    """Within this, what becomes of folders is sent home: as they begin, behind each checkpoint, and in the end.

    Args:
        folders: here, a run's; or those of a search's runs and, last, its own, which tells of them.
        home: where they belong.
        sent: what is there already.
        say: is told that something could not be sent; it is tried again.
        must_arrive: whether it is an error if the last of it cannot be sent.

    Raises:
        Exception: what the home raises then.
    """
    over, last, at_home = threading.Event(), "", dict(sent)

    def watch() -> None:
        nonlocal last
        while not over.wait(POLL_S):
            try:
                _send(_to_send(folders(), at_home), home, at_home)
            except Exception as error:  # the home may be away for a while
                if last != (last := f"what was saved could not be sent, trying again: {error}"):
                    say(last)

    watching = threading.Thread(target=watch, name="sends home", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        try:
            _send(folders(), home, at_home)
        except OSError as error:
            if must_arrive:
                raise
            say(f"the last of it could not be sent, and is here alone, in {folders()[-1]}: {error}")


def _to_send(folders: Sequence[Path], at_home: Sent) -> list[Path]:
    """Those of these folders that have come further than what is at home."""
    marks = {folder: run_files.marks(folder) for folder in folders}
    further = [folder for folder in folders if marks[folder].items() - at_home.get(folder, {}).items()]
    if further and further[-1] == folders[-1]:
        # It tells of the others, of which all has to be there then.
        return [folder for folder in folders if folder in further or run_files.SUMMARY not in marks[folder]]
    return further


def _send(folders: Sequence[Path], home: Home, at_home: dict[Path, Mapping[str, run_files.Stamp]]) -> None:
    """Send what is new of these, and note it."""
    with ExitStack() as stack:
        # What tells of others is held first, and sent last.
        held = {folder: stack.enter_context(run_files.held(folder)) for folder in reversed(folders)}
        for folder in folders:
            found, sent = held[folder], at_home.get(folder, {})
            # A checkpoint is sent as a whole, or not at all.
            new = {run_files.unit_of(name) for name, stamp in found.items() if sent.get(name) != stamp}
            changed = [name for name in found if run_files.unit_of(name) in new]
            if changed or sent.keys() - found.keys():
                with run_files.end_held_back(folder) as ends:
                    home.keep(folder, changed, list(found))
                if ends and run_files.EVENTS in changed:
                    # That the run is finished comes behind all that it has come to.
                    home.keep(folder, [run_files.EVENTS], list(found))
            at_home[folder] = found


# ---------------------------------------------------------------- home is an address


class AtAddress:
    """Home is a folder at an address, with a folder for each run and each search."""

    def __init__(self, root: str) -> None:
        """At this address."""
        self._root = root.rstrip("/")

    def place(self, name: str) -> Place:
        """Where a run, or a search, is."""
        return place_of(f"{self._root}/{name}")

    def read(self, of: str, name: str) -> bytes | None:
        """A file of a run or a search; None: there is none."""
        try:
            return self.place(of).read(name)
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Of the runs and searches that are there."""
        return place_of(self._root).folders()

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
