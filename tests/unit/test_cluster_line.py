"""The line of a cluster: who begins, who makes room, and that deaths between any two acts change nothing."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymill.cluster.decisions import Dismiss, End, MakeReady, Start, decide, wanted_room
from raymill.cluster.line import (
    ATTEMPT,
    INTERRUPTED,
    KEEP_READY_S,
    MAKE_ROOM,
    MOST_LOST,
    NOT_TAKEN,
    READY,
    STOP,
    TUNE,
    Asked,
    Job,
    Ready,
    Request,
    Shape,
    needed_code,
    read,
    read_ready,
    was_killed,
)
from raymill.cluster.on_head.attempt import as_attempt
from raymill.cluster.spec import ClusterSpec
from raymill.cluster.submitted import _again, _asked
from raymill.config.load import load_job
from raymill.errors import InputError
from raymill.record.folder import RunFolder
from raymill.tune.command import load_search, trials_in_all
from raymill.tune.folder import StudyFolder

HERE = ClusterSpec(kind="local")

SEARCH = {"space": {"optimizer.lr": {"kind": "uniform", "low": 0.1, "high": 0.2}}, "trials": 8}


def request(name: str, began_ms: int, **asked: Any) -> Job:
    code = asked.pop("code", "c0de")
    told = Asked(run=name, job="job", user=asked.pop("user", "anna"), command=("train",), **asked)
    return Job(name, told.as_metadata(), "SUCCEEDED", 0, began_ms, began_ms + 1, code)


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
        elif isinstance(one, End):
            found.append(("room" if one.makes_room else "end", one.attempt.job.id, None))
    return found


def ready(after: str, code: str = "c0de", workers: int = 1, status: str = "RUNNING", exit_code: int | None = None) -> Job:
    told = {"raymill": READY, "after": after, "shape": Shape(code, workers, 1.0, 0.0).as_text()}
    return Job(f"{after}-ready", told, status, exit_code, 50)


def about_ready(
    jobs: list[Job], cpus: float = 1, now_ms: int = 1000, in_place: tuple[str, ...] = (), *, others_wait: bool = False
) -> list[str]:
    """Who is to do what: "start a-try-1 by b-ready", "make b-ready", "dismiss b-ready", "room a-try-1"."""
    found = []
    for one in decide(read(jobs), cpus, 0, read_ready(jobs), now_ms, in_place, others_wait=others_wait):
        if isinstance(one, Start):
            found.append(f"start {one.id}" + (f" by {one.by.job.id}" if one.by else ""))
        elif isinstance(one, MakeReady):
            found.append(f"make {one.id}")
        elif isinstance(one, Dismiss):
            found.append(f"dismiss {one.ready.job.id}")
        else:
            found.append(f"room {one.attempt.job.id}")
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
        # Its machines were taken away, and nobody has asked it to stop.
        ("FAILED", INTERRUPTED, "WAITING"),
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


def test_a_cluster_that_grows_is_asked_for_room_for_all_that_run_or_wait() -> None:
    line = [
        request("a", 0, most=4),
        attempt("a", workers=3),
        request("b", 1, least=2, most=2, cpus=4.0, gpus=1.0),
        request("c", 2),
    ]
    wanted = wanted_room(read([*line, attempt("c", 1, "SUCCEEDED", 0)]))
    assert wanted == [{"CPU": 1.0}] * 3 + [{"CPU": 4.0, "GPU": 1.0}] * 2
    assert wanted_room(read([request("c", 2), attempt("c", 1, "SUCCEEDED", 0)])) == []


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


def over(name: str, ended_ms: int = 500, **asked: Any) -> list[Job]:
    """A run that is over, whose workers may be followed by others that stand ready."""
    done = attempt(name, 1, "SUCCEEDED", 0)
    return [request(name, 0, keeps_ready=True, **asked), replace(done, ended_ms=ended_ms)]


def test_after_a_run_workers_stand_ready_for_one_like_it_once() -> None:
    assert about_ready(over("a")) == ["make a-ready"]
    assert about_ready([*over("a"), ready("a")]) == []
    # Those that died are not replaced: what killed them would kill the next.
    assert about_ready([*over("a"), ready("a", status="FAILED", exit_code=1)]) == []
    # Nobody wants them, or it is too long ago, or there is no room, or their number is not known.
    assert about_ready([request("a", 0), over("a")[1]]) == []
    assert about_ready(over("a"), now_ms=500 + int(KEEP_READY_S * 1000)) == []
    assert about_ready([*over("a"), request("b", 1), attempt("b")]) == []
    assert about_ready(over("a", least=1, most=2), cpus=4) == []
    # Beside a run that leaves room; not while anybody waits.
    assert about_ready([*over("a"), request("b", 1), attempt("b")], cpus=2) == ["make a-ready"]
    # What can never begin on this cluster is in nobody's way.
    assert about_ready([*over("a"), request("b", 1, least=2, most=2)]) == ["make a-ready"]
    assert about_ready([*over("a"), request("b", 1)], cpus=2) == ["start b-try-1"]


def test_a_run_like_them_takes_those_that_stand_ready_and_any_other_sends_them_away() -> None:
    stands = [*over("a"), ready("a")]
    assert about_ready([*stands, request("b", 1)]) == ["start b-try-1 by a-ready"]
    assert about_ready([*stands, request("b", 1, code="other")]) == ["dismiss a-ready"]
    assert about_ready([*stands, request("b", 1, cpus=0.5)]) == ["dismiss a-ready"]
    # Nobody is in their way where there is room for both.
    assert about_ready([*stands, request("b", 1, code="other")], cpus=2) == ["start b-try-1"]
    # An elastic run keeps what it begins with, so it begins when they are gone, unless they leave all that it may have.
    assert about_ready([*stands, request("b", 1, least=1, most=2)], cpus=2) == ["dismiss a-ready"]
    assert about_ready([*stands, request("b", 1, least=1, most=2)], cpus=3) == ["start b-try-1"]
    assert about_ready([*over("a"), request("b", 1, least=1, most=4)], cpus=2) == ["start b-try-1"]
    # They make room before anybody who trains does.
    low = [request("low", 0), attempt("low"), request("high", 1, priority=1, code="other")]
    assert about_ready([*stands, *low], cpus=2) == ["dismiss a-ready"]
    assert about_ready([*over("a"), *low], cpus=1) == ["room low-try-1"]
    # Nor in that of others, beside the line.
    assert about_ready(stands, others_wait=True) == ["dismiss a-ready"]
    assert about_ready(over("a"), others_wait=True) == []
    # Too old, or a run of other code was the last.
    assert about_ready(stands, now_ms=500 + int(KEEP_READY_S * 1000)) == ["dismiss a-ready"]
    assert about_ready([*stands, *over("b", ended_ms=600, code="other")]) == ["dismiss a-ready"]
    # One at a time, and none ahead of who stands before.
    assert about_ready([*stands, request("b", 1), request("c", 2)]) == ["start b-try-1 by a-ready"]
    assert (
        about_ready([*stands, request("b", 1, least=2, most=2, cpus=1.0, code="x"), request("c", 2)], cpus=2)[0]
        == "dismiss a-ready"
    )


def test_code_that_is_in_place_already_need_not_be_waited_for() -> None:
    coming = replace(request("b", 1), status="PENDING", exit_code=None)
    assert about_ready([*over("a"), ready("a"), coming]) == []
    assert about_ready([*over("a"), ready("a"), coming], in_place=("c0de",)) == ["start b-try-1 by a-ready"]
    assert about_ready([coming], in_place=("c0de",)) == ["start b-try-1"]
    assert about_ready([replace(coming, status="FAILED", exit_code=1)], in_place=("c0de",)) == []


def test_what_becomes_of_those_that_stood_ready_becomes_of_the_attempt() -> None:
    told = {**attempt("b").metadata, "by": "a-ready"}
    given = [*over("a"), request("b", 1), Job("b-try-1", told, "SUCCEEDED", 0, 200)]
    [last] = [one for one in read([*given, ready("a")]) if one.asked.run == "b"]
    assert (last.state, last.attempts[0].job.id, last.holds()) == ("RUNNING", "a-ready", (1.0, 0.0))
    assert about_ready([*given, ready("a")]) == [], "they are no longer to be had, and hold their room"
    becomes = {
        ("SUCCEEDED", 0): "SUCCEEDED",
        ("FAILED", 1): "FAILED",
        ("FAILED", NOT_TAKEN): "WAITING",
        ("STOPPED", None): "INTERRUPTED",
    }
    for (status, code), expected in becomes.items():
        [last] = [one for one in read([*given, ready("a", status=status, exit_code=code)]) if one.asked.run == "b"]
        assert last.state == expected
    # Nobody knows of them any more: they are lost.
    assert [one.state for one in read(given) if one.asked.run == "b"] == ["WAITING"]
    assert about_ready([*given, ready("a", status="FAILED", exit_code=NOT_TAKEN)]) == ["start b-try-2"]


def test_code_stays_for_what_is_not_over_for_the_last_that_is_and_for_those_that_stand_ready() -> None:
    jobs = [
        *over("a", 500, code="1"),
        *over("b", 600, code="2"),
        request("c", 3, code="3"),
        ready("z", code="4"),
        ready("y", code="5", status="FAILED", exit_code=NOT_TAKEN),
    ]
    assert needed_code(read(jobs), read_ready(jobs)) == {"2", "3", "4"}


@dataclass
class Ray:
    """A cluster whose queue is killed between any two acts, and whose runs are killed too."""

    draw: random.Random
    cpus: int
    jobs: dict[str, Job] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    told: dict[str, Job] = field(default_factory=dict)
    now_ms: int = 0

    def look(self) -> list[Job]:
        """What Ray knows, and what lies on the head's disk: attempts that those who stood ready were given."""
        return [*self.jobs.values(), *(job for job in self.told.values() if job.id not in self.jobs)]

    def submit(self, name: str, metadata: dict[str, str], status: str) -> None:
        self.jobs.setdefault(name, Job(name, metadata, status))

    def tick(self) -> None:
        self.now_ms += 1000
        for job in [job for job in self.told.values() if self.draw.random() < 0.3]:
            self.jobs.setdefault(job.id, replace(job, status="SUCCEEDED", exit_code=0))
        jobs = self.look()
        requests, stands = read(jobs), read_ready(jobs)
        self.check(requests, stands)
        for one in decide(requests, self.cpus, 0, stands, self.now_ms):
            if self.draw.random() < 0.3:
                return
            if isinstance(one, Start) and one.by:
                self.told.setdefault(one.by.job.id, Job(one.id, one.as_metadata(), "PENDING"))
                continue
            if isinstance(one, Start | MakeReady):
                self.submit(one.id, one.as_metadata(), "RUNNING")
                continue
            if isinstance(one, Dismiss):
                if one.ready.job.id not in self.told:
                    self.end(one.ready.job.id, "FAILED", NOT_TAKEN)
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
        given = self.told.get(one.id)
        if one.metadata["raymill"] == READY and given is None:
            return
        run = (given or one).metadata["run"]
        self.left[run] -= 1
        if self.left[run] == 0:
            self.end(one.id, "SUCCEEDED", 0)
            self.order.append(run)

    def end(self, name: str, status: str, exit_code: int) -> None:
        if self.jobs[name].lives:
            self.jobs[name] = replace(self.jobs[name], status=status, exit_code=exit_code, ended_ms=self.now_ms)

    def check(self, requests: list[Request], stands: list[Ready]) -> None:
        unused = sum(one.shape.holds()[0] for one in stands if one.job.lives and not one.is_given)
        assert sum(one.holds()[0] for one in requests) + unused <= self.cpus
        for one in requests:
            assert sum(found.job.lives for found in one.attempts) <= 1


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000))
def test_killed_between_any_two_acts_nothing_is_lost_doubled_or_begun_without_room(seed: int) -> None:
    draw = random.Random(seed)
    ray = Ray(draw, cpus=draw.randint(1, 4))
    names, later = [f"run{number}" for number in range(6)], []
    for number, name in enumerate(names):
        least = draw.randint(1, ray.cpus)
        asked = {"least": least, "most": draw.choice([least, ray.cpus]), "priority": draw.choice([0, 0, 1])}
        made = request(name, number, **asked, keeps_ready=draw.random() < 0.8, code=draw.choice("xy"))
        later.append((draw.choice([0, 0, 30]), made))
        ray.left[name] = draw.randint(1, 6)
    for tick in range(2000):
        ray.jobs |= {made.id: made for at, made in later if at == tick}
        ray.tick()
        if tick > 30 and all(one.exit_code is not None for one in read(ray.look())):
            break
    ended = {one.asked.run: one.state for one in read(ray.look())}
    failed = {name for name, became in ended.items() if became == "FAILED"}
    assert set(ended.values()) <= {"SUCCEEDED", "FAILED"}
    # Only what was killed time after time.
    for name in failed:
        assert (
            sum(was_killed(one.job) for found in read(ray.look()) if found.asked.run == name for one in found.attempts)
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
    first = [request("a", 0), attempt("a", 1, "FAILED", INTERRUPTED), note(STOP, "a")]
    second = replace(request("a", 9, priority=5), id="a.2")
    assert _again(read(first), "a", [], HERE)[0] == "a.2"
    done = attempt("a.2", 1, "SUCCEEDED", 0)
    with pytest.raises(InputError, match="a run that is finished"):
        _again(read([*first, second, done]), "a", [], HERE)


def test_a_search_that_is_over_goes_on_with_more_trials_and_with_no_other_change() -> None:
    over = [replace(one, metadata=one.metadata | {"command": '["tune", "a"]'}) for one in [request("a", 0)]]
    known = read([*over, attempt("a", 1, "SUCCEEDED", 0)])
    _, asked = _again(known, "a", ["search.trials=9"], HERE)
    assert asked.command == ("tune", "--resume", "a", "--set=search.trials=9", "--json")
    for wrong in (["search.trials=many"], ["search.trials=0"], ["loop.epochs=2", "search.trials=9"], []):
        with pytest.raises(InputError) as caught:
            _again(known, "a", wrong, HERE)
        assert len(caught.value.problems) == 1
    with pytest.raises(InputError, match="expected a whole number of 20 or more"):
        trials_in_all(["search.trials=19"], 20)
    assert trials_in_all(["search.trials=20"], 20) == 20


def test_an_attempt_goes_on_with_what_there_is_of_its_run_or_its_search(tmp_path: Path) -> None:
    run, study = RunFolder(tmp_path / "one"), StudyFolder(tmp_path / "two")
    train, tune = ("train", "a.yaml", "--run-id", "one", "--json"), ("tune", "a.yaml", "--study-name", "two", "--json")
    for folder in (run, study):
        folder.path.mkdir()
        (folder.path / "half").touch()
    assert as_attempt(train, run, "2") == [*train, "--set=scale.max_workers=2"]
    assert as_attempt(tune, study, "2") == [*tune, "--parallel=2"]
    assert not run.path.exists(), "what was killed before it was a run is gone"
    assert not study.path.exists()
    for record in (run.command, study.record):
        record.parent.mkdir()
        record.touch()
    assert as_attempt(train, run, "-") == ["train", "--resume", "one", "--json"]
    assert as_attempt(tune, study, "3") == ["tune", "--resume", "two", "--parallel=3", "--json"]
    assert as_attempt(("tune", "--resume", "two", "--json"), study, "3") == ["tune", "--resume", "two", "--json", "--parallel=3"]


def test_a_search_asks_for_a_trial_at_least_and_for_as_many_as_it_may_have_at_once() -> None:
    spec = load_job("smoke", ["scale.workers=2", "scale.cpus_per_worker=1.5", f"search={json.dumps(SEARCH)}"]).spec
    asked = _asked("a", "job", spec, (TUNE, "job"))
    assert (asked.least, asked.most, asked.cpus, asked.gpus) == (1, 8, 3.0, 0)
    small = spec.model_copy(update={"search": spec.search.model_copy(update={"workers": 1, "parallel": 3})})  # type: ignore[union-attr]
    asked = _asked("a", "job", small, (TUNE, "job"))
    assert (asked.least, asked.most, asked.cpus) == (1, 3, 1.5)
    one = replace(asked, most=1, cpus=1)
    [found] = read([Job("a", one.as_metadata(), "SUCCEEDED", 0)])
    assert found.shape is None, "workers that stand ready are none of a search's"
    assert _asked("a", "job", spec, ("train", "job")).most == 2, "a job with a search may be trained"


def test_a_search_is_checked_at_the_corners_of_its_space_before_it_is_handed_over() -> None:
    wrong = {**SEARCH, "space": {**SEARCH["space"], "model.hiden": {"kind": "choice", "values": [8]}}}  # type: ignore[dict-item]
    with pytest.raises(InputError, match="Did you mean 'hidden'"):
        load_search("smoke", [f"search={json.dumps(wrong)}"])
    assert load_search("smoke", [f"search={json.dumps(SEARCH)}"]).spec.search is not None
    with pytest.raises(InputError, match="expected a space to search"):
        load_search("smoke", [])


def test_an_end_names_the_attempt_that_runs() -> None:
    [found] = decide(read([request("a", 0), attempt("a", 1, "FAILED", 137), attempt("a", 2), note(STOP, "a")]), 1, 0)
    assert isinstance(found, End)
    assert found.attempt.job.id == "a-try-2"
