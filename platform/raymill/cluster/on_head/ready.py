"""Workers that stand ready for a run which nobody has submitted yet, and the command that will train it, all imported.

    python -m raymill.cluster.on_head.ready JOB SHAPE

JOB is the name of this job of Ray's. It is told a run by the queue (`head.tell_ready`), and then is an attempt like any other;
told to leave, or when its workers are lost, it ends with `line.NOT_TAKEN`.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from raymill.cluster.line import NOT_TAKEN, Shape
from raymill.cluster.on_head import attempt, head
from raymill.cluster.on_head.request import JOB_CONFIG
from raymill.orchestration import supervisor
from raymill.orchestration.cluster_facts import TOLD
from raymill.orchestration.on_ray.driver_process import DriverProcess
from raymill.orchestration.on_ray.group import Group
from raymill.preflight import process as preflight

POLL_S = 0.05

LEAVES_S = 60.0
"""A driver that is not needed has this long to end by itself. One that has just begun has to start its workers first, and what a
killed one had asked for counts as taken at Ray for three minutes more: an elastic run would not grow meanwhile."""

IMPORTED = ("raymill.api", "raymill.cli.app", "raymill.orchestration.run", "raymill.orchestration.tracker", "mlflow")
"""What the command will import."""


def main(arguments: Sequence[str]) -> int:
    """Returns what the run's command ends with, or `NOT_TAKEN`."""
    job, shape = arguments[0], Shape.from_text(arguments[1])
    os.environ.pop(JOB_CONFIG, None)
    os.chdir(head.project_of(shape.code))
    signal.signal(signal.SIGTERM, _leave)
    supervisor.ready = driver = DriverProcess(None, group=Group(shape.workers, shape.workers, shape.cpus, int(shape.gpus)))
    preflight.ready = trial = preflight.Trial()
    try:
        for name in IMPORTED:
            importlib.import_module(name)
        told = _wait(job, driver)
        if not told:
            return NOT_TAKEN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ[TOLD] = told["facts"]
        attempt.carry_out(told["run"], told["command"], "-", told["runs_at"], given_s=told["given_ms"] / 1000)
        return 0
    finally:
        trial.end()
        driver.leave(LEAVES_S)


def _wait(job: str, driver: DriverProcess) -> dict[str, Any] | None:
    """What this job is told; None: its workers are lost."""
    while (told := head.told_ready(job)) is None:
        if driver.exit_code is not None:
            return None
        time.sleep(POLL_S)
    return told


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(NOT_TAKEN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
