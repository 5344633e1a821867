"""The line of runs that wait for room on a cluster: who stands where, who begins, and who makes room for whom.

Nothing is kept of it but what Ray's Jobs API keeps anyway: a run that is submitted is a job of Ray's that puts its code in
place, each attempt at it another one, and what is asked of it (make room, stop) stands in the name of a third. All of it is
read back from the list of
jobs, on any machine, so whoever acts on it may be killed between any two acts: the same is decided again, and a job of a name
that there is already is not begun a second time.

Pure: jobs in, decisions out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

REQUEST, ATTEMPT, MAKE_ROOM, STOP = "request", "attempt", "make room", "stop"
"""What a job of Ray's is for: its metadata `raymill`."""

INTERRUPTED = 3
"""What `raymill train` ends with where a run was stopped and can be resumed."""

MOST_LOST = 5
"""Attempts of a request whose process was killed, and that were followed by another one."""

State = Literal["WAITING", "RUNNING", "SUCCEEDED", "FAILED", "INTERRUPTED"]


@dataclass(frozen=True)
class Job:
    """What Ray says of one of its jobs.

    Attributes:
        id: its submission id.
        metadata: as it was submitted with.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        exit_code: of its command; None: it goes on, or nobody saw it end.
        began_ms, ended_ms: by the head's clock.
    """

    id: str
    metadata: Mapping[str, str]
    status: str
    exit_code: int | None = None
    began_ms: int = 0
    ended_ms: int | None = None

    @property
    def lives(self) -> bool:
        """Whether it goes on, or is about to begin."""
        return self.status in ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Asked:
    """What a run asks for, as its request's metadata say it.

    Attributes:
        run: its id.
        job: the job file, for people.
        user: who submitted it.
        priority: higher ones first.
        least, most: workers; apart from each other where it is elastic.
        cpus, gpus: of each worker.
        quota_cpus: that all runs of this user may hold at once; None: no limit.
        command: arguments of `raymill`.
    """

    run: str
    job: str
    user: str
    command: tuple[str, ...]
    priority: int = 0
    least: int = 1
    most: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    quota_cpus: float | None = None

    def as_metadata(self) -> dict[str, str]:
        """As the metadata of a job of Ray's, which are texts."""
        numbers = [self.priority, self.least, self.most, self.cpus, self.gpus, self.quota_cpus]
        told = {"run": self.run, "job": self.job, "user": self.user, "asked": json.dumps(numbers)}
        return {"raymill": REQUEST, **told, "command": json.dumps(self.command)}

    @staticmethod
    def from_metadata(metadata: Mapping[str, str]) -> Asked:
        """The same, read back."""
        command = tuple(json.loads(metadata["command"]))
        return Asked(metadata["run"], metadata["job"], metadata["user"], command, *json.loads(metadata["asked"]))


@dataclass(frozen=True)
class Attempt:
    """One job of Ray's that trains a run; see `Job`.

    Attributes:
        workers: that it was given.
        is_ahead: it was let in ahead of others that had no room, and gives its room back to them.
        makes_room: it was asked to save its state and end, for others.
    """

    job: Job
    workers: int
    is_ahead: bool
    makes_room: bool


@dataclass(frozen=True)
class Request:
    """A run that was submitted, with all attempts at it.

    Attributes:
        job: the one that puts its code in place.
        stop_asked: somebody wants it to stop.
    """

    job: Job
    asked: Asked
    attempts: Sequence[Attempt] = field(default=())
    stop_asked: bool = False

    @property
    def place(self) -> tuple[int, int, str]:
        """Smaller stands further ahead."""
        return -self.asked.priority, self.job.began_ms, self.job.id

    @property
    def is_ready(self) -> bool:
        """Whether its code is in place."""
        return self.job.status == "SUCCEEDED"

    @property
    def state(self) -> State:
        """What became of it."""
        last = self.attempts[-1] if self.attempts else None
        if last is None:
            if not self.is_ready and not self.job.lives:
                return "FAILED"
            return "INTERRUPTED" if self.stop_asked else "WAITING"
        if last.job.lives:
            return "RUNNING"
        if last.job.status == "SUCCEEDED":
            return "SUCCEEDED"
        if last.job.status == "STOPPED" or last.job.exit_code == INTERRUPTED:
            return "WAITING" if last.makes_room and not self.stop_asked else "INTERRUPTED"
        if not was_killed(last.job) or sum(was_killed(one.job) for one in self.attempts) > MOST_LOST:
            return "FAILED"
        return "INTERRUPTED" if self.stop_asked else "WAITING"

    @property
    def exit_code(self) -> int | None:
        """What its command ended with; None: it is not over."""
        if self.state in ("WAITING", "RUNNING"):
            return None
        if self.state == "INTERRUPTED":
            return INTERRUPTED
        last = self.attempts[-1].job if self.attempts else self.job
        return 0 if self.state == "SUCCEEDED" else last.exit_code or 1

    def holds(self) -> tuple[float, float]:
        """CPUs and GPUs that it has now."""
        workers = self.attempts[-1].workers if self.state == "RUNNING" else 0
        return workers * self.asked.cpus, workers * self.asked.gpus


def was_killed(job: Job) -> bool:
    """Whether a job's process was killed, rather than ended by itself."""
    return job.status == "FAILED" and (job.exit_code is None or job.exit_code < 0 or job.exit_code > 128)


def read(jobs: Iterable[Job]) -> list[Request]:
    """All requests among Ray's jobs, the one that stands furthest ahead first. What cannot be read as one is none of ours."""
    by_kind: dict[str, list[Job]] = {}
    for job in jobs:
        by_kind.setdefault(job.metadata.get("raymill", ""), []).append(job)
    stops = {job.metadata.get("of") for job in by_kind.get(STOP, [])}
    making_room = {job.metadata.get("of") for job in by_kind.get(MAKE_ROOM, [])}
    attempts: dict[str, list[tuple[int, Attempt]]] = {}
    for job in by_kind.get(ATTEMPT, []):
        with suppress(KeyError, ValueError):
            told = job.metadata
            made = Attempt(job, int(told["workers"]), told.get("is_ahead") == "yes", job.id in making_room)
            attempts.setdefault(told["of"], []).append((int(told["number"]), made))
    in_order = {of: tuple(made for _, made in sorted(all_, key=lambda one: one[0])) for of, all_ in attempts.items()}
    found = []
    for job in by_kind.get(REQUEST, []):
        # Another version may have submitted it, or somebody by hand: nobody else is to wait for that.
        with suppress(KeyError, TypeError, ValueError):
            asked = Asked.from_metadata(job.metadata)
            found.append(Request(job, asked, in_order.get(job.id, ()), job.id in stops))
    return sorted(found, key=lambda one: one.place)


@dataclass(frozen=True)
class Start:
    """Begin the next attempt at a request, with so many workers."""

    request: Request
    workers: int
    is_ahead: bool

    @property
    def number(self) -> int:
        """Of the attempt, from 1 on."""
        return len(self.request.attempts) + 1

    @property
    def id(self) -> str:
        """Of its job."""
        return f"{self.request.job.id}-try-{self.number}"

    def as_metadata(self) -> dict[str, str]:
        """What its job is submitted with."""
        told = {"of": self.request.job.id, "number": str(self.number), "workers": str(self.workers)}
        return {"raymill": ATTEMPT, **told, "is_ahead": "yes" if self.is_ahead else "no", "run": self.request.asked.run}


@dataclass(frozen=True)
class End:
    """Have an attempt save its state and end: to make room for others, or for good."""

    attempt: Attempt
    makes_room: bool


def decide(requests: Sequence[Request], cpus: float, gpus: float) -> list[Start | End]:
    """What is to be done now.

    Args:
        requests: as `read` gives them.
        cpus, gpus: that the cluster has.

    The first in line begins once there is room. Those of lower priority that run make room for it, if that is enough; so do
    those that were let in ahead of it. Meanwhile elastic runs from behind may use what it cannot, with as many workers as fit.
    """
    running = [one for one in requests if one.state == "RUNNING"]
    found: list[Start | End] = [End(one.attempts[-1], makes_room=False) for one in running if one.stop_asked]
    free = [cpus - sum(one.holds()[0] for one in running), gpus - sum(one.holds()[1] for one in running)]
    held: dict[str, float] = {}
    for one in running:
        held[one.asked.user] = held.get(one.asked.user, 0.0) + one.holds()[0]
    first: Request | None = None
    for one in requests:
        if one.state != "WAITING" or least_room(one.asked, cpus, gpus):
            continue
        asked = one.asked
        quota = math.inf if asked.quota_cpus is None else asked.quota_cpus - held.get(asked.user, 0.0)
        if quota < asked.least * asked.cpus:
            # It waits for its own user's runs, and nobody for it.
            continue
        fit = min(asked.most, _how_many(free[0], asked.cpus), _how_many(free[1], asked.gpus), _how_many(quota, asked.cpus))
        if one.is_ready and fit >= asked.least and (first is None or asked.least < asked.most):
            found.append(Start(one, int(fit), is_ahead=first is not None))
            free[0] -= fit * asked.cpus
            free[1] -= fit * asked.gpus
            held[asked.user] = held.get(asked.user, 0.0) + fit * asked.cpus
        elif first is None:
            first = one
            found += _making_room(one, running, free)
    return found


def least_room(asked: Asked, cpus: float, gpus: float) -> str | None:
    """Why a run can never begin on a cluster of this size as it is now; else None."""
    wanted = (("CPUs", asked.least * asked.cpus, cpus), ("GPUs", asked.least * asked.gpus, gpus))
    short = [f"{need:g} {name}, the cluster has {there:g}" for name, need, there in wanted if need > there]
    return f"it needs {' and '.join(short)}" if short else None


def _how_many(room: float, each: float) -> float:
    # Sums of tenths are not whole.
    return math.inf if each == 0 or room == math.inf else math.floor(room / each + 1e-9)


def _making_room(first: Request, running: Sequence[Request], free: Sequence[float]) -> list[End]:
    """Which attempts are to end for a request: none, unless that is enough for it."""
    need = [first.asked.least * first.asked.cpus - free[0], first.asked.least * first.asked.gpus - free[1]]

    def lacks() -> bool:
        return max(need) > 1e-9

    def count(one: Request) -> None:
        for number, amount in enumerate(one.holds()):
            need[number] -= amount

    ending = [one for one in running if one.attempts[-1].makes_room or one.stop_asked]
    for one in ending:
        count(one)
    chosen: list[End] = []
    may = [one for one in running if one not in ending and one.place > first.place and _yields(one, first)]
    # The last in line first: it has done the least.
    for one in sorted(may, key=lambda one: one.place, reverse=True):
        if not lacks():
            break
        count(one)
        chosen.append(End(one.attempts[-1], makes_room=True))
    # Those that were asked before are asked again: whoever asked may have died in between.
    again = [End(one.attempts[-1], makes_room=True) for one in ending if not one.stop_asked]
    return again if lacks() else again + chosen


def _yields(one: Request, first: Request) -> bool:
    return one.attempts[-1].is_ahead or one.asked.priority < first.asked.priority
