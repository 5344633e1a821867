"""What is to be done about the line: who begins, who makes room for whom, and who stands ready. Pure: see `decide`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from raymill.cluster.line import ATTEMPT, KEEP_READY_S, READY, Asked, Attempt, Ready, Request, Shape, last_over


@dataclass(frozen=True)
class Start:
    """Begin the next attempt at a request, with so many workers; `by` has them ready."""

    request: Request
    workers: int
    is_ahead: bool
    by: Ready | None = None

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
        told |= {"by": self.by.job.id} if self.by else {}
        return {"raymill": ATTEMPT, **told, "is_ahead": "yes" if self.is_ahead else "no", "run": self.request.asked.run}


@dataclass(frozen=True)
class End:
    """Have an attempt save its state and end: to make room for others, or for good."""

    attempt: Attempt
    makes_room: bool


@dataclass(frozen=True)
class MakeReady:
    """Start workers for a run like one that is over, before somebody submits it."""

    after: Request
    shape: Shape

    @property
    def id(self) -> str:
        """Of its job: one for each request, whatever becomes of it."""
        return f"{self.after.job.id}-ready"

    def as_metadata(self) -> dict[str, str]:
        """What its job is submitted with."""
        return {"raymill": READY, "after": self.after.job.id, "shape": self.shape.as_text()}


@dataclass(frozen=True)
class Dismiss:
    """Let workers go that stand ready."""

    ready: Ready


Decision = Start | End | MakeReady | Dismiss


def decide(
    requests: Sequence[Request],
    cpus: float,
    gpus: float,
    ready: Sequence[Ready] = (),
    now_ms: int = 0,
    in_place: Collection[str] = (),
    *,
    others_wait: bool = False,
) -> list[Decision]:
    """What is to be done now.

    Args:
        requests: as `read` gives them.
        cpus, gpus: that the cluster has.
        ready: as `read_ready` gives them.
        now_ms: by the head's clock.
        in_place: code that is on the head already, so that nobody need wait for it.
        others_wait: somebody who uses the cluster beside raymill has no room.

    The first in line begins once there is room. Those of lower priority that run make room for it, if that is enough; so do
    those that were let in ahead of it. Meanwhile elastic runs from behind may use what it cannot, with as many workers as fit.
    Workers that stand ready are for a run like theirs, and go as soon as they are in anybody's way.
    """
    running = [one for one in requests if one.state == "RUNNING"]
    spare = [one for one in ready if one.job.lives and not one.is_given]
    found: list[Decision] = [End(one.attempts[-1], makes_room=False) for one in running if one.stop_asked]
    free = _left([cpus, gpus], [one.holds() for one in running] + [one.shape.holds() for one in spare])
    held = _held(running)
    first: Request | None = None
    for one in requests:
        if one.state != "WAITING" or least_room(one.asked, cpus, gpus):
            continue
        asked = one.asked
        quota = math.inf if asked.quota_cpus is None else asked.quota_cpus - held[asked.user]
        if quota < asked.least * asked.cpus:
            # It waits for its own user's runs, and nobody for it.
            continue
        may_begin = one.is_ready or (one.job.lives and one.job.code in in_place)
        own = next((have for have in spare if have.shape == one.shape), None)
        room = min(_how_many(free[0], asked.cpus), _how_many(free[1], asked.gpus))
        fit = min(asked.most, room, _how_many(quota, asked.cpus))
        # An elastic run keeps what it begins with: rather than begin small beside those that stand ready, it has them leave.
        waits_for_more = bool(spare) and room < asked.most
        if own and may_begin and first is None:
            found.append(Start(one, asked.most, is_ahead=False, by=own))
            spare.remove(own)
            held[asked.user] += asked.most * asked.cpus
        elif may_begin and fit >= asked.least and (asked.least < asked.most if first else not waits_for_more):
            found.append(Start(one, int(fit), is_ahead=first is not None))
            free = _left(free, [(fit * asked.cpus, fit * asked.gpus)])
            held[asked.user] += fit * asked.cpus
        elif first is None:
            first = one
            found += _way_for(one, running, spare, free)
    if others_wait:
        return [*found, *map(Dismiss, spare)]
    waits = [one for one in requests if one.state == "WAITING" and least_room(one.asked, cpus, gpus) is None]
    return [*found, *([] if waits else _about_ready(requests, ready, spare, free, now_ms))]


def _way_for(first: Request, running: Sequence[Request], spare: Sequence[Ready], free: Sequence[float]) -> list[Dismiss | End]:
    """Who is to go, so that the first in line can begin: before anybody who trains, those that stand ready for another run."""
    lacks = any(need > has for need, has in zip(_needed(first.asked, first.asked.most), free, strict=True))
    going = [] if any(one.shape == first.shape for one in spare) else list(spare)
    ends = _making_room(first, running, _left(free, [(-cpus, -gpus) for cpus, gpus in (one.shape.holds() for one in spare)]))
    return [*(map(Dismiss, going) if lacks else []), *ends]


def _held(running: Sequence[Request]) -> defaultdict[str, float]:
    """User -> CPUs that their runs have."""
    held: defaultdict[str, float] = defaultdict(float)
    for one in running:
        held[one.asked.user] += one.holds()[0]
    return held


def _left(room: Sequence[float], held: Sequence[tuple[float, float]]) -> list[float]:
    """CPUs and GPUs that are left of some."""
    return [room[0] - sum(one[0] for one in held), room[1] - sum(one[1] for one in held)]


def _about_ready(
    requests: Sequence[Request], ready: Sequence[Ready], spare: Sequence[Ready], free: Sequence[float], now_ms: int
) -> list[MakeReady | Dismiss]:
    """What is to be done about workers that stand ready, while nobody waits: there are some for a run like the last one."""
    last = last_over(requests)
    if last is None:
        return []
    wanted = last.shape if last.asked.keeps_ready and now_ms - (last.ended_ms or 0) < KEEP_READY_S * 1000 else None
    found: list[MakeReady | Dismiss] = [Dismiss(one) for one in spare if one.shape != wanted]
    has_room = wanted is not None and all(has >= needs for has, needs in zip(free, wanted.holds(), strict=True))
    if wanted and has_room and not spare and all(one.after != last.job.id for one in ready):
        found.append(MakeReady(last, wanted))
    return found


def wanted_room(requests: Sequence[Request]) -> list[dict[str, float]]:
    """What each worker needs, of all that run or wait: as large a cluster has room for them, if it is one that grows."""
    found = []
    for one in requests:
        workers = one.attempts[-1].workers if one.state == "RUNNING" else one.asked.least if one.state == "WAITING" else 0
        each = {name: amount for name, amount in (("CPU", one.asked.cpus), ("GPU", one.asked.gpus)) if amount}
        found += [each] * workers
    return found


def least_room(asked: Asked, cpus: float, gpus: float) -> str | None:
    """Why a run can never begin on a cluster of this size as it is now; else None."""
    least_cpus, least_gpus = _needed(asked, asked.least)
    wanted = (("CPUs", least_cpus, cpus), ("GPUs", least_gpus, gpus))
    short = [f"{need:g} {name}, the cluster has {there:g}" for name, need, there in wanted if need > there]
    return f"it needs {' and '.join(short)}" if short else None


def _needed(asked: Asked, workers: int) -> tuple[float, float]:
    """CPUs and GPUs of so many of its workers."""
    return workers * asked.cpus, workers * asked.gpus


def _how_many(room: float, each: float) -> float:
    # Sums of tenths are not whole.
    return math.inf if each == 0 or room == math.inf else math.floor(room / each + 1e-9)


def _making_room(first: Request, running: Sequence[Request], free: Sequence[float]) -> list[End]:
    """Which attempts are to end for a request: none, unless that is enough for it."""
    need = _left(_needed(first.asked, first.asked.least), [(free[0], free[1])])

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
