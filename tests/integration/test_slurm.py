"""The script for Slurm, run for real but for Slurm itself: stand-ins of its commands start what they are told on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from integration.commands import PROJECT, Home

pytestmark = pytest.mark.cluster

SRUN = """#!/bin/bash
# Every node is this machine; --ntasks says how often.
tasks=1
while [[ $1 == --* ]]; do [[ $1 == --ntasks=* ]] && tasks=${1#--ntasks=}; shift; done
for ((task = 1; task < tasks; task++)); do "$@" & done
"$@"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo one; echo two; else echo "$@" >> "$SLURM_SUBMIT_DIR/asked"; fi
"""
HOSTNAME = """#!/bin/bash
echo 127.0.0.1
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A project to submit from, and commands of Slurm that are none."""
    home = Home(tmp_path / "home")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("hostname", HOSTNAME)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in ("jobs", "pipelines"):
        shutil.copytree(PROJECT / name, tmp_path / "project" / name)
    (tmp_path / "project" / "pyproject.toml").write_text("[tool.raymill]\n")
    home.environment |= {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path / "project"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "[one,two]",
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_TMPDIR": str(home.scratch),
    }
    return home


def test_it_starts_ray_on_its_nodes_trains_and_leaves_no_token(home: Home, tmp_path: Path) -> None:
    script = ["bash", str(PROJECT / "cluster" / "slurm" / "raymill.sbatch"), "smoke", "--set", "register=null"]
    said = tmp_path / "said"
    with said.open("w") as out:
        process = subprocess.Popen(script, env=home.environment, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True)
    try:
        code = process.wait(timeout=300)
    finally:
        # Slurm ends what is left of a job; here nobody does.
        os.killpg(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(home.processes(), timeout=30)
        for left in alive:
            left.kill()
    assert code == 0, said.read_text()
    summary = json.loads((home.path / "runs" / "slurm-4711" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 20)
    assert list(home.path.glob("*.token")) == [], "the token is gone with the job"
