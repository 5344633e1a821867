"""A project of one's own: the built wheel in an environment of its own, `raymill init`, and what a user does next."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration


def run(environment: Path, cwd: Path, *words: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("RAYMILL_HOME", "PYTHONPATH")}
    return subprocess.run(
        [str(environment / words[0]), *words[1:]],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def result(environment: Path, cwd: Path, *words: str) -> dict[str, Any]:
    done = run(environment, cwd, *words, "--json")
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_the_wheel_holds_the_engine_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"raymill"}
    assert "raymill/py.typed" in names
    assert "raymill/catalogue/jobs/mnist/job.yaml" in names


def test_jobs_and_pipelines_of_this_repository_are_not_to_be_imported(environment: Path, tmp_path: Path) -> None:
    program = "import importlib.util as u, raymill; print(u.find_spec('jobs'), u.find_spec('pipelines'), raymill.__file__)"
    said = run(environment, tmp_path, "python", "-c", program).stdout.split()
    assert said[:2] == ["None", "None"]
    assert Path(said[2]).is_relative_to(environment.parent)


def test_a_new_project_trains_in_process_and_on_two_workers_and_its_own_test_passes(environment: Path, tmp_path: Path) -> None:
    made = result(environment, tmp_path, "raymill", "init", "mine")
    project = tmp_path / "mine"
    assert made["job"] == "demo"
    assert made["next"][0] == "cd mine"
    assert result(environment, project, "raymill", "check", "demo")["rows"] == {"train": 600, "validation": 120}

    here = result(environment, project, "raymill", "train", "demo", "--in-process")
    assert here["status"] == "finished"
    assert here["rows"] == {"used": 1200, "skipped": 0, "remaining": 0, "total": 1200}
    two = result(environment, project, "raymill", "train", "demo")
    assert (two["status"], two["num_workers"], two["rows"]) == ("finished", 2, here["rows"])
    assert {facts["run_id"] for facts in result(environment, project, "raymill", "runs", "list")["runs"]} == {
        here["run_id"],
        two["run_id"],
    }
    assert (project / ".raymill" / "runs" / here["run_id"]).is_dir()

    tested = run(environment, project, "python", "-m", "pytest", "-q")
    assert tested.returncode == 0, tested.stdout
    assert "1 passed" in tested.stdout


def test_a_job_of_the_catalogue_is_copied_with_the_data_code_that_it_needs(environment: Path, tmp_path: Path) -> None:
    result(environment, tmp_path, "raymill", "init", "digits", "--from", "mnist")
    project = tmp_path / "digits"
    files = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    assert {"jobs/mnist/job.yaml", "jobs/mnist/model.py", "pipelines/images.py", "pipelines/packages.py"} <= files
    assert "pipelines/synthetic.py" not in files
    refused = run(environment, project, "raymill", "check", "mnist")
    assert refused.returncode == 2
    assert "raymill data get" in refused.stderr


def test_what_is_there_is_left_alone_and_a_wrong_name_leads_to_the_right_one(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    refused = run(environment, tmp_path, "raymill", "init", "taken", "--from", "mnits")
    assert refused.returncode == 2
    assert "2 problems" in refused.stderr
    assert "Did you mean 'mnist'?" in refused.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "thesis.txt"]
