"""The SQLite store of MLflow: made whole wherever its maker is killed, by however many makers, and in a folder of any name."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

USE = """
import json
from pathlib import Path
from raymill.tracking.mlflow_client import connect, experiment_id, mlflow_settings
with mlflow_settings():
    client = connect()
    experiment = experiment_id(client, "job")
    run = client.create_run(experiment)
    client.log_dict(run.info.run_id, {"a": 1}, "a.json")
    from mlflow.artifacts import download_artifacts
    found = download_artifacts(artifact_uri=f"{run.info.artifact_uri}/a.json")
    assert json.loads(Path(found).read_text()) == {"a": 1}
print(found)
"""

KILLED = """
import os, signal, sys
from pathlib import Path
rename, moment = Path.rename, sys.argv[1]
def killed(self, target):
    if moment == "renamed":
        rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killed
from raymill.tracking.mlflow_client import connect, mlflow_settings
with mlflow_settings():
    connect()
"""


def python(code: str, *arguments: str, home: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAYMILL_HOME": str(home)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=home.parent)


def succeed(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    return out.splitlines()[-1]


@pytest.mark.parametrize("moment", ["staged", "renamed"])
def test_a_store_whose_maker_was_killed_around_its_renaming_opens_for_the_next(moment: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    killed = python(KILLED, moment, home=home)
    killed.communicate(timeout=200)
    assert killed.returncode == -signal.SIGKILL
    assert (home / "mlflow.db").exists() == (moment == "renamed")
    assert (home / "mlflow.db.stage").exists() == (moment == "staged")
    succeed(python(USE, home=home))
    assert not (home / "mlflow.db.stage").exists()


def test_two_makers_at_once_make_one_store(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    makers = [python(USE, home=home) for _ in range(2)]
    for maker in makers:
        succeed(maker)
    with sqlite3.connect(home / "mlflow.db") as store:
        names = store.execute("select name from experiments").fetchall()
        assert store.execute("select count(*) from runs").fetchone() == (2,)
    store.close()
    assert sorted(names) == [("Default",), ("job",)]


@pytest.mark.parametrize("name", ["a b", "a#b", "z\u00fcrich [1]*+@:;&="])
def test_the_store_and_its_files_lie_in_the_home_whatever_its_name_holds(name: str, tmp_path: Path) -> None:
    home = tmp_path / name
    home.mkdir()
    found = Path(succeed(python(USE, home=home)))
    assert found.is_relative_to(home / "artifacts" / "job")
    assert (home / "mlflow.db").is_file()
    assert list(tmp_path.iterdir()) == [home]
