"""Runs that are submitted to a cluster of three nodes: they go on when whoever submitted them leaves, stand in line, make room
for others, and end with the same weights whichever of their parts are killed.
"""

from __future__ import annotations

import json
import random
import signal
import stat
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from integration.commands import Home, wait_until
from integration.test_cluster import STEP_TIMEOUT_S, expected_batches, trained_batches, until
from integration.test_tune import command, num_over, told
from raymill.record.events import AttemptStarted, StageReached, StepDone, read_events

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

QUICK = ("--set", "loop.epochs=6", "--set", "checkpoint.every_steps=10", "--set", "register=null")
SLOW = ("--set", "data.num_rows=6000", "--set", "loop.epochs=16", "--set", "checkpoint.every_steps=10", "--set", "register=null")
STRICT = ("--set", "loop.strict=true")
"""The weights are the same at any number of workers: a run of one in a process of its own tells those of two on a cluster."""


class Cluster(Home):
    """A state folder with a cluster that runs."""

    def submit(self, *arguments: str) -> str:
        """The id of a run that was submitted."""
        return str(self.json("submit", *arguments, "--json")["run_id"])

    def submitted(self) -> dict[str, dict[str, Any]]:
        """Run -> what `raymill ps` says of it."""
        return {one["run_id"]: one for one in self.json("ps", "--json")["submitted"]}

    def step_of(self, run: str) -> int:
        return max((event.step for event in self.events_of(run) if isinstance(event, StepDone)), default=0)

    def events_of(self, run: str) -> list[Any]:
        path = self.path / "runs" / run / "events.jsonl"
        return read_events(path)[0] if path.exists() else []

    def summary(self, run: str) -> dict[str, Any]:
        return dict(json.loads((self.path / "runs" / run / "summary.json").read_text()))

    def kill(self, what: str, choose: Callable[[list[psutil.Process]], psutil.Process] = lambda found: found[0]) -> bool:
        """Kill one process of this cluster whose command line has these words."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if what in " ".join(process.cmdline()):
                    found.append(process)
        if found:
            choose(found).kill()
        return bool(found)

    def runs(self, what: str) -> bool:
        """Whether there is a process of this cluster whose command line has these words."""
        for process in self.processes():
            with suppress(psutil.Error):
                if what in " ".join(process.cmdline()):
                    return True
        return False

    def stages(self, run: str) -> list[str]:
        return [event.stage for event in self.events_of(run) if isinstance(event, StageReached)]

    def wait_for_end(self, *runs: str) -> dict[str, dict[str, Any]]:
        def are_over() -> bool:
            known = self.submitted()
            return all(known[run]["exit_code"] is not None for run in runs)

        until(are_over, STEP_TIMEOUT_S, f"the end of {runs}")
        return self.submitted()


def alone(tmp_path_factory: pytest.TempPathFactory, *arguments: str) -> str:
    """The weights of the same run with a Ray of its own."""
    return str(Home(tmp_path_factory.mktemp("alone")).json("train", *arguments, "--json")["weights_sha256"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster of cluster/local.yaml: three nodes of a CPU each, room for one run of two workers."""
    found = Cluster(tmp_path_factory.mktemp("home"))
    found.json("cluster", "up", "local", "--json")
    try:
        yield found
    finally:
        found.run("cluster", "down", "local")
    assert found.left_over() == []
    assert list((found.path / "submitted").iterdir()) == [], "the code of runs goes with the cluster"


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> str:
    return alone(tmp_path_factory, "smoke", *SLOW)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> str:
    return alone(tmp_path_factory, "smoke", *QUICK)


@pytest.fixture(scope="module")
def slow_by_itself(tmp_path_factory: pytest.TempPathFactory) -> str:
    return alone(tmp_path_factory, "smoke", *SLOW, *STRICT, "--in-process")


READY = "on_head.ready"
"""In the command line of workers that stand ready, and of the run that they were given."""

STOOD_READY = "workers that stood ready take over"

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def answer(url: str, token: str | None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_it_asks_for_its_token_and_nobody_else_can_read_or_reach_it(cluster: Cluster) -> None:
    told = cluster.json("cluster", "status", "local", "--json")
    token = Path(told["token_file"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    jobs = f"{told['dashboard']}/api/jobs/"
    assert [answer(jobs, one) for one in (None, "0" * 64, token.read_text())] == [401, 403, 200]
    listening = {
        (process.name(), connection.laddr.ip)
        for process in cluster.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) > 3
    assert {one for one in listening if one[1] not in LOOPBACK} == set()
    assert token.read_text() not in "".join(" ".join(process.cmdline()) for process in cluster.processes())


def test_a_token_that_others_may_read_is_refused_and_so_is_what_is_no_job(cluster: Cluster) -> None:
    before = cluster.submitted()
    token = cluster.path / "clusters" / "local" / "token"
    token.chmod(0o644)
    try:
        code, _, said = cluster.run("ps")
    finally:
        token.chmod(0o600)
    assert (code, "a file that others may read" in said) == (2, True)
    code, _, said = cluster.run("submit", "smoke", "--set", "loop.epocs=1")
    assert (code, "loop.epocs" in said) == (2, True)
    code, _, said = cluster.run("submit", "smoke", "--cluster", "locl")
    assert (code, "Did you mean 'local'?" in said) == (2, True)
    assert cluster.run("cluster", "up", "local")[0] == 2, "it runs already"
    assert cluster.submitted() == before


def test_its_nodes_are_looked_at_and_differ_in_nothing(cluster: Cluster) -> None:
    told = cluster.json("cluster", "check", "local", "--json")
    assert told["differences"] == []
    assert [one["versions"]["ray"] for one in told["nodes"]] == [ray.__version__] * 3
    assert all(one["bandwidth_mb_s"] > 1 and abs(one["skew_s"]) < 1 for one in told["nodes"])


def test_what_runs_gives_way_and_goes_on_later(
    cluster: Cluster, slow_by_itself: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    quick = alone(tmp_path_factory, "smoke", *QUICK, *STRICT, "--in-process")
    first = cluster.submit("smoke", *SLOW, *STRICT)
    until(lambda: cluster.step_of(first) >= 15, STEP_TIMEOUT_S, "steps of the first")
    urgent = cluster.submit("smoke", *QUICK, *STRICT, "--priority", "5")
    until(lambda: cluster.step_of(urgent) >= 1, STEP_TIMEOUT_S, "steps of the urgent one")
    known = cluster.submitted()
    assert [(known[run]["status"], known[run]["place"]) for run in (first, urgent)] == [("WAITING", 1), ("RUNNING", None)]
    # Whoever acts on the line dies.
    assert cluster.kill("ray::Queue")
    # Who waits may leave the line.
    left = cluster.submit("smoke", *QUICK)
    cluster.json("stop", left, "--json")
    code, out, _ = cluster.run("logs", first, "--follow")
    assert code == 0, out
    known = cluster.wait_for_end(first, urgent, left)
    assert [known[run]["attempts"] for run in (first, urgent, left)] == [2, 1, 0]
    assert (known[left]["status"], known[left]["exit_code"]) == ("INTERRUPTED", 3)
    assert [cluster.summary(run)["weights_sha256"] for run in (first, urgent)] == [slow_by_itself, quick]
    # Each step once: it was asked to make room, and saved its state.
    assert [event.step for event in cluster.events_of(first) if isinstance(event, StepDone)] == list(range(1, 1601))
    assert known[urgent]["ended_ms"] < known[first]["ended_ms"]


@pytest.mark.cluster
def test_workers_that_stand_ready_are_there_for_the_next_run_which_goes_on_without_its_driver(
    cluster: Cluster, slow_by_itself: str
) -> None:
    cluster.wait_for_end(cluster.submit("smoke", *QUICK, *STRICT))
    until(lambda: cluster.runs(READY), STEP_TIMEOUT_S, "workers that stand ready")
    run = cluster.submit("smoke", *SLOW, *STRICT)
    until(lambda: cluster.step_of(run) >= 20, STEP_TIMEOUT_S, "steps")
    assert cluster.stages(run)[0] == STOOD_READY
    assert cluster.kill("on_ray.driver")
    code, out, _ = cluster.run("logs", run, "--follow")
    assert code == 0, out
    assert cluster.summary(run)["weights_sha256"] == slow_by_itself
    assert cluster.submitted()[run]["attempts"] == 1
    assert len(list((cluster.path / "submitted").glob("*/" + "[0-9a-f]" * 16))) == 1, "the same code is there once"


@pytest.mark.cluster
def test_it_goes_on_without_its_terminal_through_a_dead_worker_and_is_stopped_and_resumed(cluster: Cluster, slow: str) -> None:
    before = set(cluster.submitted())
    submitting = cluster.start("submit", "smoke", *SLOW, "--follow", "--json")
    wait_until(lambda: bool(set(cluster.submitted()) - before), submitting)
    [run] = set(cluster.submitted()) - before
    wait_until(lambda: cluster.step_of(run) >= 3, submitting)
    # The terminal is closed, whatever was going on in it.
    submitting.send_signal(signal.SIGKILL)
    submitting.communicate()
    assert cluster.kill("ray::RayTrainWorker")
    attached = cluster.start("logs", run, "--follow")
    reached = cluster.step_of(run) + 20
    try:
        wait_until(lambda: cluster.step_of(run) >= reached, attached)
    except BaseException:
        print(cluster.run("logs", run)[1])
        raise
    told = cluster.json("stop", run, "--json")
    assert told["run_id"] == run
    attached.communicate(timeout=240)
    assert attached.returncode == 3, "saved, and can be resumed"
    listed = cluster.submitted()[run]
    assert (listed["status"], listed["exit_code"]) == ("INTERRUPTED", 3)
    again = cluster.json("submit", "--resume", run, "--json")
    assert again == {"run_id": run, "cluster": "local", "submission_id": f"{run}.2"}
    code, _, said = cluster.run("submit", "--resume", run)
    assert (code, "a run that is" in said) == (2, True)
    code, out, _ = cluster.run("logs", run, "--follow")
    assert code == 0, out
    assert cluster.summary(run)["weights_sha256"] == slow
    assert cluster.json("runs", "show", run, "--json")["status"] == "finished"
    of_it = [one for one in cluster.json("ps", "--json")["submitted"] if one["run_id"] == run]
    assert [one["status"] for one in of_it] == ["SUCCEEDED", "INTERRUPTED"]


@pytest.mark.cluster
def test_a_higher_priority_makes_what_runs_give_way_and_go_on_later_with_the_same_weights(
    cluster: Cluster, slow: str, quick: str
) -> None:
    first = cluster.submit("smoke", *SLOW)
    until(lambda: cluster.step_of(first) >= 15, STEP_TIMEOUT_S, "steps of the first")
    second = cluster.submit("smoke", *QUICK)
    urgent = cluster.submit("smoke", *QUICK, "--priority", "5")
    until(lambda: cluster.step_of(urgent) >= 1, STEP_TIMEOUT_S, "steps of the urgent one")
    known = cluster.submitted()
    assert {run: (one["status"], one["place"]) for run, one in known.items() if run in (first, second, urgent)} == {
        first: ("WAITING", 1),
        second: ("WAITING", 2),
        urgent: ("RUNNING", None),
    }
    # Whoever acts on the line dies.
    assert cluster.kill("ray::Queue")
    # Who waits may leave the line.
    left = cluster.submit("smoke", *QUICK)
    cluster.json("stop", left, "--json")
    code, out, _ = cluster.run("logs", first, "--follow")
    assert code == 0, out
    known = cluster.wait_for_end(first, second, urgent, left)
    assert [known[run]["attempts"] for run in (first, second, urgent, left)] == [2, 1, 1, 0]
    assert (known[left]["status"], known[left]["exit_code"]) == ("INTERRUPTED", 3)
    assert [cluster.summary(run)["weights_sha256"] for run in (first, second, urgent)] == [slow, quick, quick]
    # Each step once: it was asked to make room, and saved its state.
    assert [event.step for event in cluster.events_of(first) if isinstance(event, StepDone)] == list(range(1, 1601))
    assert known[urgent]["ended_ms"] < known[first]["ended_ms"] < known[second]["ended_ms"]


@pytest.mark.cluster
def test_a_run_is_not_lost_with_those_that_stood_ready_for_it_and_another_kind_of_run_sends_them_away(
    cluster: Cluster, slow: str, quick: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cluster.wait_for_end(cluster.submit("smoke", *QUICK))
    until(lambda: cluster.runs(READY), STEP_TIMEOUT_S, "workers that stand ready")
    run = cluster.submit("smoke", *SLOW)
    until(lambda: cluster.step_of(run) >= 20, STEP_TIMEOUT_S, "steps")
    # Whoever acts on the line dies too, before Ray was told whose attempt it is. Of the attempt only its shell: Ray takes it for
    # dead, and it goes on.
    assert cluster.kill("ray::Queue")
    assert cluster.kill(READY, lambda found: next(one for one in found if one.name() == "sh"))
    cluster.wait_for_end(run)
    assert cluster.summary(run)["weights_sha256"] == slow
    assert cluster.submitted()[run]["attempts"] == 2
    until(lambda: cluster.runs(READY), STEP_TIMEOUT_S, "workers that stand ready")
    three = cluster.submit("smoke", *QUICK, "--workers", "3")
    cluster.wait_for_end(three)
    assert STOOD_READY not in cluster.stages(three)
    assert cluster.summary(three)["weights_sha256"] == alone(tmp_path_factory, "smoke", *QUICK, "--workers", "3")
    # They are killed while they wait: the run that would have had them has an attempt that never began.
    until(lambda: cluster.runs(READY), STEP_TIMEOUT_S, "workers that stand ready")
    assert cluster.kill("on_ray.driver")
    again = cluster.submit("smoke", *QUICK, "--workers", "3")
    cluster.wait_for_end(again)
    assert cluster.summary(again)["weights_sha256"] == cluster.summary(three)["weights_sha256"]


@pytest.mark.cluster
def test_its_driver_and_then_its_supervisor_are_killed_and_it_goes_on_by_itself(cluster: Cluster, slow: str) -> None:
    run = cluster.submit("smoke", *SLOW)
    attached = cluster.start("attach", run)
    until(lambda: cluster.step_of(run) >= 20, STEP_TIMEOUT_S, "step 20")
    assert cluster.kill("on_ray.driver")
    until(lambda: cluster.step_of(run) >= 100, STEP_TIMEOUT_S, "step 100")
    assert cluster.kill("on_head.", lambda found: next(one for one in found if one.name() != "sh"))
    out, _ = attached.communicate(timeout=STEP_TIMEOUT_S)
    assert attached.returncode == 0, out
    assert cluster.summary(run)["weights_sha256"] == slow
    assert cluster.submitted()[run]["attempts"] == 2


@pytest.mark.cluster
def test_five_at_once_run_in_order_however_often_the_queue_is_killed(cluster: Cluster, quick: str) -> None:
    draw = random.Random(0)
    submitting = [cluster.start("submit", "smoke", *QUICK, "--json") for _ in range(5)]
    runs = [str(json.loads(one.communicate(timeout=240)[0])["run_id"]) for one in submitting]
    killed = 0

    def are_over() -> bool:
        nonlocal killed
        if draw.random() < 0.3:
            killed += cluster.kill("ray::Queue")
        known = cluster.submitted()
        return all(known[run]["exit_code"] is not None for run in runs)

    until(are_over, 2 * STEP_TIMEOUT_S, "the end of five runs")
    assert killed >= 10
    known = cluster.submitted()
    assert [known[run]["attempts"] for run in runs] == [1] * 5
    assert [cluster.summary(run)["weights_sha256"] for run in runs] == [quick] * 5
    in_line = sorted(runs, key=lambda run: (known[run]["submitted_ms"], run))
    begun = sorted(runs, key=lambda run: next(one.time_s for one in cluster.events_of(run) if isinstance(one, AttemptStarted)))
    assert begun == in_line


@pytest.mark.cluster
def test_a_node_is_lost_in_the_middle_and_another_one_comes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = Path(__file__).parents[2] / ".raymill" / "data" / "mnist"
    if not data.exists():
        pytest.skip("needs `raymill data get mnist`")
    job = ["mnist", "--set", f"data.root={data}", "--set", "loop.epochs=1", "--set", "checkpoint.every_steps=10"]
    job += ["--set", "register=null", "--set", "loop.threads=1"]
    expected = alone(tmp_path_factory, *job, "--workers", "2")
    run = cluster.submit(*job, "--workers", "2")
    until(lambda: cluster.step_of(run) >= 15, STEP_TIMEOUT_S, "steps")
    of_workers = [psutil.Process(one.ppid()) for one in cluster.processes() if "RayTrainWorker" in one.name()]
    raylet = next(one for one in of_workers if "--head" not in one.cmdline())
    assert raylet.name() == "raylet"
    raylet.kill()
    cluster.json("cluster", "up", "local", "--json")
    code, out, _ = cluster.run("logs", run, "--follow")
    assert code == 0, out
    assert cluster.summary(run)["weights_sha256"] == expected
    assert [node["runs"] for node in cluster.json("cluster", "status", "local", "--json")["nodes"]] == [True] * 3


@pytest.mark.cluster
def test_a_search_gives_way_goes_on_later_is_stopped_and_resumed_and_ends_as_one_that_was_left_alone(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    job = [*command()[1:2], *command()[3:], "--set", "data.num_rows=6000", "--set", "loop.epochs=4"]
    whole = Home(tmp_path_factory.mktemp("alone"))
    expected = whole.json("tune", *job, "--json")
    study = cluster.submit(*job, "--tune")
    until(lambda: num_over(cluster) >= 1, STEP_TIMEOUT_S, "a trial")
    # Of the three CPUs the search has one.
    urgent = cluster.submit("smoke", *QUICK, "--workers", "3", "--priority", "5")
    until(lambda: cluster.step_of(urgent) >= 1, STEP_TIMEOUT_S, "steps of the urgent one")
    known = cluster.submitted()
    assert [(known[run]["status"], known[run]["place"]) for run in (study, urgent)] == [("WAITING", 1), ("RUNNING", None)]
    reached = num_over(cluster)
    assert reached < 7
    until(lambda: num_over(cluster) > reached, STEP_TIMEOUT_S, "another trial")
    assert cluster.kill("raymill.tune.driver")
    cluster.json("stop", study, "--json")
    cluster.wait_for_end(study)
    assert cluster.submitted()[study]["status"] == "INTERRUPTED"
    assert cluster.json("submit", "--resume", study, "--json")["submission_id"] == f"{study}.2"
    code, out, _ = cluster.run("logs", study, "--follow")
    assert code == 0, out
    assert told(cluster) == told(whole)
    shown = cluster.json("tune", "show", study, "--json")
    assert (shown["trials"], shown["best"]["value"]) == ({"complete": 8}, expected["best"]["value"])
    of_it = [one for one in cluster.json("ps", "--json")["submitted"] if one["run_id"] == study]
    assert [(one["status"], one["attempts"]) for one in of_it] == [("SUCCEEDED", 1), ("INTERRUPTED", 2)]
    # It is over, and goes on with two more, also when the attempt that has begun with them is killed.
    cluster.json("submit", "--resume", study, "--set", "search.trials=10", "--json")
    until(lambda: num_over(cluster) == 9, STEP_TIMEOUT_S, "one trial more")
    assert cluster.kill("on_head.", lambda found: next(one for one in found if one.name() != "sh"))
    cluster.wait_for_end(study)
    whole.json("tune", "--resume", expected["study"], "--trials", "10", "--json")
    assert told(cluster) == told(whole)


@pytest.mark.cluster
def test_an_elastic_run_loses_a_node_and_gets_another_and_trains_on_each_batch_once(cluster: Cluster) -> None:
    values = ["scale.workers=null", "scale.min_workers=1", "scale.max_workers=3", "scale.resize_check_s=2"]
    values += ["data.num_rows=6000", "loop.epochs=60", "checkpoint.every_steps=20", "loop.record_order=true", "register=null"]
    # Those that stand ready for another kind of run leave, and with them all that Ray keeps for them.
    cluster.wait_for_end(cluster.submit("smoke", *QUICK))
    until(lambda: cluster.runs(READY), STEP_TIMEOUT_S, "workers that stand ready")
    run = cluster.submit("smoke", *(part for value in values for part in ("--set", value)))

    def starts() -> list[AttemptStarted]:
        return [event for event in cluster.events_of(run) if isinstance(event, AttemptStarted)]

    def trains(num_workers: int) -> bool:
        """Whether this many workers have begun, and made a few steps."""
        begun = starts()
        return bool(begun) and begun[-1].num_workers == num_workers and cluster.step_of(run) >= begun[-1].step + 30

    until(lambda: trains(3), STEP_TIMEOUT_S, "three workers")
    # Not the head's: its driver is there.
    raylets = {psutil.Process(one.ppid()) for one in cluster.processes() if "RayTrainWorker" in one.name()}
    max(raylets, key=lambda one: one.create_time()).kill()
    until(lambda: trains(2), STEP_TIMEOUT_S, "two workers")
    cluster.json("cluster", "up", "local", "--json")
    until(lambda: trains(3), STEP_TIMEOUT_S, "three workers again")
    code, out, _ = cluster.run("logs", run, "--follow")
    assert code == 0, out
    begun = [{"attempt": one.attempt, "num_workers": one.num_workers} for one in starts()]
    assert trained_batches(cluster.path / "runs" / run, begun) == expected_batches("smoke", values)
    told = cluster.summary(run)
    assert (told["rows"]["used"], told["rows"]["total"], told["num_workers"]) == (360_000, 360_000, 3)
    assert cluster.submitted()[run]["attempts"] == 1


@pytest.mark.cluster
def test_all_of_it_is_killed_and_goes_on_when_it_is_up_again_and_a_new_cluster_goes_on_with_the_run(
    cluster: Cluster, slow: str
) -> None:
    run, next_one = cluster.submit("smoke", *SLOW), cluster.submit("smoke", *QUICK)

    until(lambda: cluster.step_of(run) >= 100, STEP_TIMEOUT_S, "step 100")
    cluster.kill_all()
    cluster.json("cluster", "up", "local", "--json")
    until(lambda: cluster.step_of(run) >= 400, STEP_TIMEOUT_S, "step 400, by itself")
    known = cluster.submitted()
    assert (known[run]["attempts"], known[next_one]["status"], known[next_one]["place"]) == (2, "WAITING", 1)
    # Now what its head knew is lost too.
    cluster.kill_all()
    cluster.json("cluster", "down", "local", "--json")
    cluster.json("cluster", "up", "local", "--json")
    assert not {run, next_one} & set(cluster.submitted())
    assert cluster.json("submit", "--resume", run, "--json")["run_id"] == run
    code, out, _ = cluster.run("attach", run)
    assert code == 0, out
    assert cluster.summary(run)["weights_sha256"] == slow


@pytest.mark.cluster
def test_its_head_is_killed_and_the_line_goes_on_with_another(cluster: Cluster, slow: str, quick: str) -> None:
    run, next_one = cluster.submit("smoke", *SLOW), cluster.submit("smoke", *QUICK)
    until(lambda: cluster.step_of(run) >= 100, STEP_TIMEOUT_S, "step 100")
    [head, *_] = cluster.json("cluster", "status", "local", "--json")["nodes"]
    process = psutil.Process(head["pid"])
    for one in (*process.children(recursive=True), process):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    cluster.json("cluster", "up", "local", "--json")
    known = cluster.wait_for_end(run, next_one)
    assert [known[one]["attempts"] for one in (run, next_one)] == [2, 1]
    assert [cluster.summary(one)["weights_sha256"] for one in (run, next_one)] == [slow, quick]
    assert [node["runs"] for node in cluster.json("cluster", "status", "local", "--json")["nodes"]] == [True] * 3
