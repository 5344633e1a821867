"""A cluster whose runs are kept in an object store too: its machine is lost, disk and all, and a run goes on on another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from integration.commands import Home, smoke_project
from integration.test_cluster import STEP_TIMEOUT_S, until
from integration.test_tune import command, num_over, told
from object_store import ObjectStore, serving
from raymill.record.events import StepDone, read_events

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

JOB = ["smoke", "--set", "data.num_rows=6000", "--set", "loop.epochs=16", "--set", "checkpoint.every_steps=10"]
JOB += ["--set", "register=null", "--set", "loop.strict=true"]


@dataclass
class Machines:
    """Two machines, one after the other, of a cluster whose runs are kept at an address that both reach."""

    alone: Home
    first: Home
    second: Home
    store: ObjectStore

    def has_commit(self, run: str) -> bool:
        """Whether so much of a run is kept that it can be gone on with."""
        listed = self.store.client.list_objects_v2(Bucket="kept", Prefix=f"runs/{run}/").get("Contents", [])
        names = [one["Key"].removeprefix(f"runs/{run}/") for one in listed]
        return "attempt" in names and any(name.endswith("checksums.json") for name in names)

    def read(self, name: str, file: str) -> bytes:
        """One of them."""
        content: bytes = self.store.client.get_object(Bucket="kept", Key=f"runs/{name}/{file}")["Body"].read()
        return content

    def move(self, job: list[str], is_reached: Callable[[str], bool]) -> str:
        """Submit a job on the first machine, lose that and its disk, and go on on the second to the end. Returns its id."""
        self.first.json("cluster", "up", "mine", "--json")
        run: str = self.first.json("submit", *job, "--cluster", "mine", "--json")["run_id"]
        until(lambda: is_reached(run), STEP_TIMEOUT_S, "the moment when the machine is lost")
        self.first.kill_all()
        for place in (self.first.path, self.first.scratch):
            shutil.rmtree(place)
        self.second.json("cluster", "up", "mine", "--json")
        try:
            code, _, said = self.second.run("submit", "--resume", f"{run}0", "--cluster", "mine")
            assert (code, "a run that was submitted to this cluster" in said) == (2, True)
            assert self.second.json("submit", "--resume", run, "--cluster", "mine", "--json")["run_id"] == run
            code, out, said = self.second.run("logs", run, "--cluster", "mine", "--follow")
            assert code == 0, out + said
        finally:
            self.second.json("cluster", "down", "mine", "--json")
        assert self.second.left_over() == []
        return run


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    project = smoke_project(tmp_path / "project")
    (project / "cluster").mkdir()
    written = {"kind": "local", "nodes": [{"num_cpus": 2}], "keep_ready": False, "runs_at": "s3://kept/runs"}
    (project / "cluster" / "mine.yaml").write_text(yaml.safe_dump(written))
    alone, first, second = (Home(tmp_path / name, project) for name in ("alone", "first", "second"))
    with serving() as store:
        store.client.create_bucket(Bucket="kept")
        for home in (first, second):
            home.environment |= store.environment
        yield Machines(alone, first, second, store)


def test_the_machine_is_lost_with_its_disk_and_the_run_goes_on_on_another_one(machines: Machines) -> None:
    expected = machines.alone.json("train", *JOB, "--in-process", "--json")
    first_steps = 0

    def is_reached(run: str) -> bool:
        nonlocal first_steps
        first_steps = machines.first.step()
        return first_steps >= 100 and machines.has_commit(run)

    run = machines.move(JOB, is_reached)
    folder = machines.second.path / "runs" / run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert summary["rows"] == expected["rows"]
    steps = [event.step for event in read_events(folder / "events.jsonl")[0] if isinstance(event, StepDone)]
    assert set(steps) == set(range(1, 1601))
    assert len(steps) < 1600 + first_steps, "it went on from what was kept"
    assert json.loads(machines.read(run, "summary.json"))["weights_sha256"] == expected["weights_sha256"]
    # Its new place has an MLflow store of its own, which is told all of it.
    assert summary["delivered_to_mlflow"]
    assert machines.second.json("runs", "show", run, "--json")["status"] == "finished"


def test_the_machine_is_lost_with_its_disk_and_the_search_goes_on_on_another_one(machines: Machines, tmp_path: Path) -> None:
    job = [*command()[1:2], *command()[3:], "--set", "data.num_rows=6000", "--set", "loop.epochs=2"]
    expected = machines.alone.json("tune", *job, "--json")
    # So that it is lost in the middle of a trial.
    machines.first.environment |= {"RAYMILL_FAULT": "step_done:slow:seconds=0.05", "RAYMILL_FAULT_FOLDER": str(tmp_path)}

    def is_reached(study: str) -> bool:
        """Whether two trials are kept, and some of a third."""
        return machines.has_commit(f"{study}-0002")

    study = machines.move([*job, "--tune"], is_reached)
    assert told(machines.second) == told(machines.alone)
    assert num_over(machines.second) == 8
    attempts = [(machines.second.path / "runs" / f"{study}-{number:04d}" / "attempt").read_text() for number in range(3)]
    assert attempts == ["1", "1", "2"], "what was over was not run again, and what had begun went on"
    assert machines.read(study, "trials.jsonl").count(b"\n") == 8
    shown = machines.second.json("tune", "show", study, "--json")
    assert shown["best"]["value"] == expected["best"]["value"]
    of_search = machines.second.json("tune", "list", "--json")["studies"]
    assert [one["study"] for one in of_search] == [study]
