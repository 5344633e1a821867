"""The line of runs that wait for room on a cluster: who stands where, and what became of each.

Nothing is kept of it but what Ray's Jobs API keeps anyway: a run that is submitted is a job of Ray's that puts its code in
place, each attempt at it another one, and what is asked of it (make room, stop) stands in the name of a third. All of it is
read back from the list of jobs, on any machine, so whoever acts on it may be killed between any two acts: the same is decided
again, and a job of a name that there is already is not begun a second time.

Pure: jobs in, requests out; what is to be done about them is decided in `decisions`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

REQUEST, ATTEMPT, READY, MAKE_ROOM, STOP = "request", "attempt", "ready", "make room", "stop"
"""What a job of Ray's is for: its metadata `raymill`."""

TUNE = "tune"
"""The first word of a search's command."""

KEEP_READY_S = 600.0
"""How long after a run's end workers are kept ready for the next one like it."""

INTERRUPTED = 3
"""What `raymill train` ends with where a run was stopped and can be resumed."""

NOT_TAKEN = 75
"""What workers that were ready end with if they were given no run: for whoever was to be theirs, they are lost. EX_TEMPFAIL."""

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
        code: names the code that was sent with it; see `queue.code_of`.
    """

    id: str
    metadata: Mapping[str, str]
    status: str
    exit_code: int | None = None
    began_ms: int = 0
    ended_ms: int | None = None
    code: str = ""

    @property
    def lives(self) -> bool:
        """Whether it goes on, or is about to begin."""
        return self.status in ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Asked:
    """What a run asks for, as its request's metadata say it; or a search, each of whose trials is to the line what a worker is.

    Attributes:
        run: its id; of a search, the study's name.
        job: the job file, for people.
        user: who submitted it.
        priority: higher ones first.
        least, most: workers; apart from each other where it is elastic, as a search is.
        cpus, gpus: of each worker.
        quota_cpus: that all runs of this user may hold at once; None: no limit.
        keeps_ready: whether workers are to be ready afterwards for another run like it.
        runs_at: where its folder is kept beside the head's disk; None: nowhere.
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
    keeps_ready: bool = False
    runs_at: str | None = None

    @property
    def is_search(self) -> bool:
        """Whether it is a search."""
        return self.command[0] == TUNE

    def as_metadata(self) -> dict[str, str]:
        """As the metadata of a job of Ray's, which are texts."""
        values = [self.priority, self.least, self.most, self.cpus, self.gpus, self.quota_cpus, self.keeps_ready, self.runs_at]
        told = {"run": self.run, "job": self.job, "user": self.user, "asked": json.dumps(values)}
        return {"raymill": REQUEST, **told, "command": json.dumps(self.command)}

    @staticmethod
    def from_metadata(metadata: Mapping[str, str]) -> Asked:
        """The same, read back."""
        command = tuple(json.loads(metadata["command"]))
        return Asked(metadata["run"], metadata["job"], metadata["user"], command, *json.loads(metadata["asked"]))


@dataclass(frozen=True)
class Shape:
    """What workers have to be like to be those of a run, though nobody knows which.

    Attributes:
        code: that they import; see `Job`.
        workers: how many.
        cpus, gpus: of each.
    """

    code: str
    workers: int
    cpus: float
    gpus: float

    def holds(self) -> tuple[float, float]:
        """CPUs and GPUs that they have."""
        return self.workers * self.cpus, self.workers * self.gpus

    def as_text(self) -> str:
        """In one line."""
        return json.dumps([self.code, self.workers, self.cpus, self.gpus])

    @staticmethod
    def from_text(text: str) -> Shape:
        """The same, read back."""
        return Shape(*json.loads(text))


@dataclass(frozen=True)
class Ready:
    """A job of Ray's that holds workers ready for a run that nobody has submitted yet.

    Attributes:
        after: the request whose end was the reason.
        shape: what they are like.
        is_given: an attempt was given to it, and it will train that.
    """

    job: Job
    after: str
    shape: Shape
    is_given: bool


@dataclass(frozen=True)
class Attempt:
    """One job of Ray's that trains a run; see `Job`. One that had stood ready does so for the attempt that it was given.

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
            # One that saved its state though Ray was not asked to stop it has lost its machines.
            goes_on = last.makes_room or last.job.status != "STOPPED"
            return "WAITING" if goes_on and not self.stop_asked else "INTERRUPTED"
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

    @property
    def ended_ms(self) -> int | None:
        """When it was over."""
        if self.exit_code is None:
            return None
        return (self.attempts[-1].job if self.attempts else self.job).ended_ms

    @property
    def shape(self) -> Shape | None:
        """What its workers have to be like; None: their number may change, or it is a search, which has actors of its own."""
        asked = self.asked
        return None if asked.least < asked.most or asked.is_search else Shape(self.job.code, asked.most, asked.cpus, asked.gpus)

    def holds(self) -> tuple[float, float]:
        """CPUs and GPUs that it has now."""
        workers = self.attempts[-1].workers if self.state == "RUNNING" else 0
        return workers * self.asked.cpus, workers * self.asked.gpus


def was_killed(job: Job) -> bool:
    """Whether a job's process was killed, rather than ended by itself."""
    code = job.exit_code
    return job.status == "FAILED" and (code is None or code < 0 or code > 128 or code == NOT_TAKEN)


def read(jobs: Iterable[Job]) -> list[Request]:
    """All requests among Ray's jobs, the one that stands furthest ahead first. What cannot be read as one is none of ours."""
    by_kind = _by_kind(jobs)
    ready = {job.id: job for job in by_kind.get(READY, [])}
    stops = {job.metadata.get("of") for job in by_kind.get(STOP, [])}
    making_room = {job.metadata.get("of") for job in by_kind.get(MAKE_ROOM, [])}
    attempts: dict[str, list[tuple[int, Attempt]]] = {}
    for job in by_kind.get(ATTEMPT, []):
        with suppress(KeyError, ValueError):
            told, trains = job.metadata, _who_trains(job, ready)
            made = Attempt(trains, int(told["workers"]), told.get("is_ahead") == "yes", trains.id in making_room)
            attempts.setdefault(told["of"], []).append((int(told["number"]), made))
    in_order = {of: tuple(made for _, made in sorted(all_, key=lambda one: one[0])) for of, all_ in attempts.items()}
    found = []
    for job in by_kind.get(REQUEST, []):
        # Another version may have submitted it, or somebody by hand: nobody else is to wait for that.
        with suppress(KeyError, TypeError, ValueError):
            asked = Asked.from_metadata(job.metadata)
            found.append(Request(job, asked, in_order.get(job.id, ()), job.id in stops))
    return sorted(found, key=lambda one: one.place)


def read_ready(jobs: Iterable[Job]) -> list[Ready]:
    """All that stands ready, or did, among Ray's jobs."""
    by_kind = _by_kind(jobs)
    given = {job.metadata.get("by") for job in by_kind.get(ATTEMPT, [])}
    found = []
    for job in by_kind.get(READY, []):
        with suppress(KeyError, TypeError, ValueError):
            found.append(Ready(job, job.metadata["after"], Shape.from_text(job.metadata["shape"]), job.id in given))
    return found


def needed_code(requests: Sequence[Request], ready: Sequence[Ready]) -> set[str]:
    """The code that has to stay in place: of what is not over, and of the last run that is, for another one like it."""
    last = last_over(requests)
    needed = [one for one in requests if one.exit_code is None or one is last]
    return {one.job.code for one in needed} | {one.shape.code for one in ready if one.job.lives}


def last_over(requests: Sequence[Request]) -> Request | None:
    """The one that was the last to be over."""
    over = [one for one in requests if one.ended_ms is not None]
    return max(over, key=lambda one: (one.ended_ms or 0, one.job.id), default=None)


def _by_kind(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.metadata.get("raymill", ""), []).append(job)
    return found


def _who_trains(attempt: Job, ready: Mapping[str, Job]) -> Job:
    """The job that makes an attempt: itself, or one that had stood ready for it."""
    by = attempt.metadata.get("by")
    if by is None:
        return attempt
    # One that Ray knows nothing of any more can have done nothing.
    return replace(ready.get(by, Job(by, {}, "FAILED")), began_ms=attempt.began_ms)
