"""The line of a cluster: who begins, who makes room, and that deaths between any two acts change nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.cluster.line import ATTEMPT, INTERRUPTED, MAKE_ROOM, MOST_LOST, STOP, Asked, End, Job, Request, Start, decide, read
from raymill.cluster.submitted import _again
from raymill.errors import InputError


def request(name: str, began_ms: int, **asked: Any) -> Job:
    told = Asked(run=name, job="job", user=asked.pop("user", "anna"), command=("train",), **asked)
    return Job(name, told.as_metadata(), "SUCCEEDED", 0, began_ms, began_ms + 1)


def attempt(name: str, number: int = 1, status: str = "RUNNING", exit_code: int | None = None, workers: int = 1) -> Job:
    told = {"raymill": ATTEMPT, "of": name, "number": str(number), "workers": str(workers), "is_ahead": "no"}
    return Job(f"{name}-try-{number}", told, status, exit_code, 100 + number)


def note(what: str, of: str) -> Job:
    return Job(f"{of}-{what}", {"raymill": what, "of": of}, "SUCCEEDED", 0)


def decided(jobs: list[Job], cpus: float = 1, gpus: float = 0) -> list[tuple[str, str, Any]]:
    found: list[tuple[str, str, Any]] = []
    for one in decide(read(jobs), cpus, gpus):
        if isinstance(one, Start):
            found.append(("start", one.id, one.workers))
        else:
            found.append(("room" if one.makes_room else "end", one.attempt.job.id, None))
    return found


def state(*jobs: Job) -> str:
    return read(jobs)[0].state


def test_the_first_in_line_begins_and_the_others_wait() -> None:
    line = [request(name, number) for number, name in enumerate("abcde")]
    assert decided(line[::-1]) == [("start", "a-try-1", 1)]
    assert decided([*line, attempt("a")]) == []
    assert decided([*line, attempt("a", status="SUCCEEDED", exit_code=0)]) == [("start", "b-try-1", 1)]
    assert decided(line, cpus=2) == [("start", "a-try-1", 1), ("start", "b-try-1", 1)]
    # Of equal time, the name decides.
    assert decided([request("y", 5), request("x", 5)]) == [("start", "x-try-1", 1)]


def test_a_higher_priority_goes_first_and_what_runs_makes_room_for_it() -> None:
    line = [request("a", 0), request("b", 1), request("c", 2, priority=5)]
    assert decided(line) == [("start", "c-try-1", 1)]
    running = [*line, attempt("a")]
    assert decided(running) == [("room", "a-try-1", None)]
    # Until it has ended, it is asked again, and nobody else is.
    asked = [*running, note(MAKE_ROOM, "a-try-1")]
    assert decided(asked) == [("room", "a-try-1", None)]
    ended = [*line, attempt("a", 1, "FAILED", INTERRUPTED), note(MAKE_ROOM, "a-try-1")]
    assert decided(ended) == [("start", "c-try-1", 1)]
    # It goes on behind it, and before b, which came later.
    assert decided([*ended, attempt("c", 1, "SUCCEEDED", 0)]) == [("start", "a-try-2", 1)]


def test_none_makes_room_where_it_would_not_be_enough_or_is_no_lower() -> None:
    same = [request("a", 0, priority=5), request("c", 2, priority=5), attempt("a")]
    assert decided(same) == []
    large = [
        request("a", 0),
        request("z", 1, priority=9),
        request("c", 2, priority=5, least=2, most=2),
        attempt("a"),
        attempt("z"),
    ]
    assert decided(large, cpus=2) == []
    # The least that is enough, the last in line first.
    three = [request(name, number) for number, name in enumerate("abc")]
    line = [*three, *map(attempt, "abc"), request("d", 9, priority=1, least=2, most=2)]
    assert decided(line, cpus=3) == [("room", "c-try-1", None), ("room", "b-try-1", None)]


def test_what_cannot_use_its_room_yet_lets_elastic_runs_ahead_which_give_it_back() -> None:
    line = [request("a", 0, least=2, most=2), request("b", 1, least=3, most=3), request("c", 2), request("d", 3, least=1, most=4)]
    running = attempt("a", workers=2)
    # b needs 3 of the 3 CPUs; c is fixed and would be in its way, d is not.
    assert decided([*line, running], cpus=3) == [("start", "d-try-1", 1)]
    [start] = [one for one in decide(read([*line, running]), 3, 0) if isinstance(one, Start)]
    ahead = Job(start.id, start.as_metadata(), "RUNNING")
    assert decided([*line, running, ahead], cpus=3) == []
    done = replace(running, status="SUCCEEDED", exit_code=0)
    assert decided([*line, done, ahead], cpus=3) == [("room", "d-try-1", None)]


def test_an_elastic_run_is_given_what_there_is() -> None:
    assert decided([request("a", 0, least=2, most=6, cpus=0.5)], cpus=2.3) == [("start", "a-try-1", 4)]
    assert decided([request("a", 0, least=1, most=6, cpus=0.1)], cpus=0.3) == [("start", "a-try-1", 3)]
    assert decided([request("a", 0, most=4, gpus=1, cpus=0.0)], cpus=0, gpus=3) == [("start", "a-try-1", 3)]


def test_what_can_never_fit_is_in_nobodys_way() -> None:
    assert decided([request("a", 0, least=5, most=5), request("b", 1)], cpus=2) == [("start", "b-try-1", 1)]
    assert decided([request("a", 0, gpus=1), request("b", 1)], cpus=2) == [("start", "b-try-1", 1)]


def test_a_user_holds_no_more_than_a_quota_and_others_go_on() -> None:
    line = [request(name, number, quota_cpus=2.0) for number, name in enumerate("abc")] + [request("d", 9, user="berta")]
    assert [one[1] for one in decided(line, cpus=4)] == ["a-try-1", "b-try-1", "d-try-1"]
    assert decided([request("a", 0, least=1, most=9, quota_cpus=3.0)], cpus=8) == [("start", "a-try-1", 3)]


def test_whose_code_is_not_in_place_yet_keeps_its_place() -> None:
    first = replace(request("a", 0), status="RUNNING", exit_code=None)
    assert decided([first, request("b", 1)]) == []
    assert decided([replace(first, status="FAILED", exit_code=1), request("b", 1)]) == [("start", "b-try-1", 1)]
    assert state(replace(first, status="FAILED", exit_code=1)) == "FAILED"


@pytest.mark.parametrize(
    ("status", "exit_code", "becomes"),
    [
        ("SUCCEEDED", 0, "SUCCEEDED"),
        ("FAILED", 1, "FAILED"),
        ("FAILED", 2, "FAILED"),
        ("FAILED", INTERRUPTED, "INTERRUPTED"),
        ("STOPPED", None, "INTERRUPTED"),
        ("FAILED", 137, "WAITING"),
        ("FAILED", -9, "WAITING"),
        ("FAILED", None, "WAITING"),
        ("RUNNING", None, "RUNNING"),
        ("PENDING", None, "RUNNING"),
    ],
)
def test_what_became_of_an_attempt_decides(status: str, exit_code: int | None, becomes: str) -> None:
    assert state(request("a", 0), attempt("a", 1, status, exit_code)) == becomes


def test_one_that_is_killed_again_and_again_fails() -> None:
    killed = [attempt("a", number, "FAILED", 137) for number in range(1, MOST_LOST + 2)]
    assert state(request("a", 0), *killed[:-1]) == "WAITING"
    assert state(request("a", 0), *killed) == "FAILED"


def test_a_stop_is_for_good_also_of_what_waits_or_makes_room() -> None:
    stop = note(STOP, "a")
    assert state(request("a", 0), stop) == "INTERRUPTED"
    assert decided([request("a", 0), attempt("a"), stop]) == [("end", "a-try-1", None)]
    for status, exit_code in (("FAILED", INTERRUPTED), ("STOPPED", None), ("FAILED", 137)):
        over = [request("a", 0), attempt("a", 1, status, exit_code), note(MAKE_ROOM, "a-try-1"), stop]
        assert state(*over) == "INTERRUPTED"
        assert decided(over) == []
    assert state(request("a", 0), attempt("a", 1, "SUCCEEDED", 0), stop) == "SUCCEEDED"


@dataclass
class Ray:
    """A cluster whose queue is killed between any two acts, and whose runs are killed too."""

    draw: random.Random
    cpus: int
    jobs: dict[str, Job] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def submit(self, name: str, metadata: dict[str, str], status: str) -> None:
        self.jobs.setdefault(name, Job(name, metadata, status))

    def tick(self) -> None:
        requests = read(self.jobs.values())
        self.check(requests)
        for one in decide(requests, self.cpus, 0):
            if self.draw.random() < 0.3:
                return
            if isinstance(one, Start):
                self.submit(one.id, one.as_metadata(), "RUNNING")
                continue
            if one.makes_room and not one.attempt.makes_room:
                self.submit(f"{one.attempt.job.id}-room", {"raymill": MAKE_ROOM, "of": one.attempt.job.id}, "SUCCEEDED")
                if self.draw.random() < 0.3:
                    return
            self.end(one.attempt.job.id, "FAILED", INTERRUPTED)
        for one in [one for one in self.jobs.values() if one.lives]:
            self.work(one)

    def work(self, one: Job) -> None:
        if self.draw.random() < 0.05:
            self.end(one.id, "FAILED", 137)
            return
        run = one.metadata["run"]
        self.left[run] -= 1
        if self.left[run] == 0:
            self.end(one.id, "SUCCEEDED", 0)
            self.order.append(run)

    def end(self, name: str, status: str, exit_code: int) -> None:
        if self.jobs[name].lives:
            self.jobs[name] = replace(self.jobs[name], status=status, exit_code=exit_code)

    def check(self, requests: list[Request]) -> None:
        assert sum(one.holds()[0] for one in requests) <= self.cpus
        for one in requests:
            assert sum(found.job.lives for found in one.attempts) <= 1


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000))
def test_killed_between_any_two_acts_nothing_is_lost_doubled_or_begun_without_room(seed: int) -> None:
    draw = random.Random(seed)
    ray = Ray(draw, cpus=draw.randint(1, 4))
    names = [f"run{number}" for number in range(6)]
    for number, name in enumerate(names):
        least = draw.randint(1, ray.cpus)
        asked = {"least": least, "most": draw.choice([least, ray.cpus]), "priority": draw.choice([0, 0, 1])}
        made = request(name, number, **asked)
        ray.jobs[name], ray.left[name] = made, draw.randint(1, 6)
    for _ in range(2000):
        ray.tick()
        if all(one.exit_code is not None for one in read(ray.jobs.values())):
            break
    ended = {one.asked.run: one.state for one in read(ray.jobs.values())}
    failed = {name for name, became in ended.items() if became == "FAILED"}
    assert set(ended.values()) <= {"SUCCEEDED", "FAILED"}
    # Only what was killed time after time.
    for name in failed:
        assert (
            sum(job.exit_code == 137 for job in ray.jobs.values() if job.metadata.get("run") == name and "-try-" in job.id)
            > MOST_LOST
        )
    assert sorted(ray.order) == sorted(set(names) - failed)
    assert all(ray.left[name] == 0 for name in set(names) - failed)


@pytest.mark.parametrize("changed", [{"asked": "[0"}, {"asked": "[1, 2, 3, 4, 5, 6, 7, 8]"}, {"command": "train"}, {"run": None}])
def test_what_is_no_request_of_ours_is_in_nobodys_way(changed: dict[str, Any]) -> None:
    whole = request("a", 0)
    metadata = {name: value for name, value in {**whole.metadata, **changed}.items() if value is not None}
    foreign = [replace(whole, metadata=metadata), Job("x", {"raymill": ATTEMPT, "of": "b"}, "RUNNING"), Job("y", {}, "RUNNING")]
    assert decided([*foreign, Job("z", {"raymill": STOP}, "SUCCEEDED"), request("b", 1)]) == [("start", "b-try-1", 1)]


def test_what_is_resumed_is_the_last_that_was_submitted_whatever_its_priority() -> None:
    first = [request("a", 0), attempt("a", 1, "FAILED", INTERRUPTED)]
    second = replace(request("a", 9, priority=5), id="a.2")
    assert _again(read(first), "a", [])[0] == "a.2"
    done = attempt("a.2", 1, "SUCCEEDED", 0)
    with pytest.raises(InputError, match="a run that is finished"):
        _again(read([*first, second, done]), "a", [])


def test_an_end_names_the_attempt_that_runs() -> None:
    [found] = decide(read([request("a", 0), attempt("a", 1, "FAILED", 137), attempt("a", 2), note(STOP, "a")]), 1, 0)
    assert isinstance(found, End)
    assert found.attempt.job.id == "a-try-2"
