"""A cluster whose runs are kept in an object store too: its machine is lost, disk and all, and a run goes on on another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from integration.commands import Home, smoke_project
from integration.test_cluster import STEP_TIMEOUT_S, until
from object_store import serving
from raymill.record.events import StepDone, read_events

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

JOB = ["smoke", "--set", "data.num_rows=6000", "--set", "loop.epochs=16", "--set", "checkpoint.every_steps=10"]
JOB += ["--set", "register=null", "--set", "loop.strict=true"]


def test_the_machine_is_lost_with_its_disk_and_the_run_goes_on_on_another_one(tmp_path: Path) -> None:
    project = smoke_project(tmp_path / "project")
    (project / "cluster").mkdir()
    written = {"kind": "local", "nodes": [{"num_cpus": 2}], "keep_ready": False, "runs_at": "s3://kept/runs"}
    (project / "cluster" / "mine.yaml").write_text(yaml.safe_dump(written))
    expected = Home(tmp_path / "alone", project).json("train", *JOB, "--in-process", "--json")
    with serving() as store:
        store.client.create_bucket(Bucket="kept")
        first, second = (Home(tmp_path / name, project) for name in ("first", "second"))
        for home in (first, second):
            home.environment |= store.environment
        first.json("cluster", "up", "mine", "--json")
        run = first.json("submit", *JOB, "--cluster", "mine", "--json")["run_id"]

        def is_kept() -> bool:
            listed = store.client.list_objects_v2(Bucket="kept", Prefix=f"runs/{run}/").get("Contents", [])
            names = {one["Key"].removeprefix(f"runs/{run}/") for one in listed}
            return "attempt" in names and any(name.endswith("checksums.json") for name in names)

        until(lambda: first.step() >= 100 and is_kept(), STEP_TIMEOUT_S, "step 100")
        first.kill_all()
        first_steps = first.step()
        for place in (first.path, first.scratch):
            shutil.rmtree(place)

        second.json("cluster", "up", "mine", "--json")
        try:
            code, _, said = second.run("submit", "--resume", f"{run}0", "--cluster", "mine")
            assert (code, "a run that was submitted to this cluster" in said) == (2, True)
            assert second.json("submit", "--resume", run, "--cluster", "mine", "--json")["run_id"] == run
            code, out, said = second.run("logs", run, "--cluster", "mine", "--follow")
            assert code == 0, out + said
        finally:
            second.json("cluster", "down", "mine", "--json")
        folder = second.path / "runs" / run
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["weights_sha256"] == expected["weights_sha256"]
        assert summary["rows"] == expected["rows"]
        steps = [event.step for event in read_events(folder / "events.jsonl")[0] if isinstance(event, StepDone)]
        assert set(steps) == set(range(1, 1601))
        assert len(steps) < 1600 + first_steps, "it went on from what was kept"
        kept = store.client.get_object(Bucket="kept", Key=f"runs/{run}/summary.json")["Body"].read()
        assert json.loads(kept)["weights_sha256"] == expected["weights_sha256"]
        # Its new place has an MLflow store of its own, which is told all of it.
        assert summary["delivered_to_mlflow"]
        told = second.json("runs", "show", run, "--json")
        assert told["status"] == "finished"
    assert second.left_over() == []
