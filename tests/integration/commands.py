"""The commands as a user types them, each in a process of its own, with a state folder and a temporary folder of one test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from raymill.record.events import StepDone, read_events
from raymill.record.folder import RunFolder

PROJECT = Path(__file__).parents[2]
TIMEOUT_S = 480.0
"""A command that takes longer hangs."""


def smoke_project(folder: Path) -> Path:
    """Make a project of the smallest job there is, and of what it needs; returns its folder."""
    for place in ("jobs/smoke", "pipelines"):
        shutil.copytree(PROJECT / place, folder / place, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "jobs" / "__init__.py").touch()
    (folder / "pyproject.toml").touch()
    return folder


class Home:
    """A state folder and the commands that use it.

    Args:
        path: the state folder.
        project: the folder that the commands are given in.
    """

    def __init__(self, path: Path, project: Path = PROJECT) -> None:
        self.path, self.project = path, project
        # Short, because Ray makes sockets in it, whose paths may have 107 bytes.
        self.scratch = Path(tempfile.mkdtemp(prefix="rh-"))
        weakref.finalize(self, shutil.rmtree, self.scratch, ignore_errors=True)
        self.environment = {**os.environ, "RAYMILL_HOME": str(path), "TMPDIR": str(self.scratch)}
        for address in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            self.environment.pop(address, None)

    def start(self, *arguments: str, variables: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command, with these environment variables beside the others."""
        return subprocess.Popen(
            [sys.executable, "-m", "raymill", *arguments],
            cwd=self.project,
            env={**self.environment, **(variables or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, stdin: str = "", variables: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        process = self.start(*arguments, variables=variables)
        stdout, stderr = process.communicate(stdin, timeout=TIMEOUT_S)
        return process.returncode, stdout, stderr

    def json(self, *arguments: str) -> Any:
        """What a command that must succeed prints."""
        code, stdout, stderr = self.run(*arguments)
        assert code == 0, stderr
        return json.loads(stdout)

    def kill_all(self) -> None:
        """Kill every process that was started for this state folder, and those that they start meanwhile."""
        while found := self.processes():
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found, timeout=5)

    def folder(self) -> RunFolder:
        """The folder of the only run."""
        (path,) = self.path.glob("runs/*/")
        return RunFolder(path)

    def step(self) -> int:
        """The last step that any run has reported."""
        events = [event for path in self.path.glob("runs/*/events.jsonl") for event in read_events(path)[0]]
        return max((event.step for event in events if isinstance(event, StepDone)), default=0)

    def processes(self) -> list[psutil.Process]:
        """Every process on this machine that was started for this state folder."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("RAYMILL_HOME") == str(self.path)
        except psutil.Error:
            return False

    def left_over(self) -> list[str]:
        """What is still there after its commands have ended: processes, and files in the temporary folder."""
        # Torch keeps a folder for compiled kernels; it stays on purpose.
        files = [path.name for path in self.scratch.iterdir() if not path.name.startswith("torchinductor_")]
        return [*map(str, self.processes()), *files]


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that happens while a command goes on."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        if process.poll() is not None:
            pytest.fail(f"the command ended with {process.returncode}: {process.communicate()[1]}")
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
