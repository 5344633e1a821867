"""docs/your-own-data.md, done as it says."""

from __future__ import annotations

import re
from pathlib import Path

from integration.commands import PROJECT, Home
from probes import others


def test_the_example_of_the_document_trains_and_is_measured(tmp_path: Path) -> None:
    Home(tmp_path / "state", tmp_path).run("init", "mine")
    home = Home(tmp_path / "home", tmp_path / "mine")
    (home.project / "jobs" / "trips").mkdir()
    (home.project / "jobs" / "trips" / "__init__.py").touch()
    others.write(home.project / "data" / "trips")
    document = (PROJECT / "docs" / "your-own-data.md").read_text()
    files = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["pipelines/trips.py", "jobs/trips/task.py", "jobs/trips/job.yaml"]
    for name, content in files:
        (home.project / name).write_text(content)
    checked = home.json("check", "trips", "--run", "--json")
    assert sum(checked["rows"].values()) == others.NUM_ROWS
    assert home.json("plan", "trips", "--json")["schema"]["line"] == "text"
    summary = home.json("train", "trips", "--in-process", "--json")
    errors = [one["metrics"]["validation/error"] for one in summary["evaluations"]]
    assert errors[-1] < errors[0]
    measured = home.json("evaluate", "trips@candidate", "--split", "test", "--json")
    assert measured["rows"] == checked["rows"]["test"]
    assert home.json("data", "check", "trips", "--json")
