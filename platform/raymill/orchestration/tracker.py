"""The process that delivers a run's events to MLflow: how it is started, and what it does.

    python -m raymill.orchestration.tracker RUN_FOLDER

It is a process of its own, so that training never waits for MLflow. Once a run is finished it registers the model too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raymill import ending_gc  # noqa: F401  # the process ends faster
from raymill.files import private, read_record
from raymill.orchestration.attempts import Show
from raymill.record.events import DeliveryStarted
from raymill.record.folder import RunFolder
from raymill.record.processes import take_turns_behind
from raymill.redaction import print_redacted

MAX_STARTS = 3
NICENESS = 5


class Tracker:
    """The process, from the command's point of view. Started once training goes, so that it delays nothing."""

    def __init__(self, folder: RunFolder) -> None:
        """Of this run."""
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start it if it does not run, apart from this terminal's Ctrl-C."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        with open(self._folder.tracking_log, "ab", opener=private) as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "raymill.orchestration.tracker", str(self._folder.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        take_turns_behind(self._process.pid, NICENESS)
        return self._process

    def finish(self, show: Show) -> dict[str, Any]:
        """Wait until everything is delivered; returns what the summary says about it."""
        show(DeliveryStarted())
        code = None
        for _ in range(MAX_STARTS):
            code = self.start().wait()
            # Below zero: killed by a signal. What it has not delivered is in its queue still.
            if code >= 0:
                break
        return tracking_summary(self._folder, delivered=code == 0)


def tracking_summary(folder: RunFolder, *, delivered: bool) -> dict[str, Any]:
    """What a run's summary says about MLflow.

    Returns:
        delivered_to_mlflow, model (name, version, alias, and why it is not exported where it is not) where one was registered,
        not_registered where it was refused, and a note where something went wrong.
    """
    found: dict[str, Any] = {"delivered_to_mlflow": delivered}
    if folder.model_version.exists():
        found["model"] = read_record(folder.model_version)
    if not delivered:
        failure = read_record(folder.tracking_failure) if folder.tracking_failure.exists() else {}
        why = failure.get("message", "it did not say why")
        if failure.get("refused"):
            found["not_registered"] = why
        again = f"python -m raymill.orchestration.tracker {folder.path}"
        found["note"] = f"MLflow did not take everything: {why}. The rest is kept; deliver it with `{again}`"
    return found


# ---------------------------------------------------------------- the process


def main(argv: Sequence[str] | None = None) -> int:
    """Deliver one run's events until the run ends. Returns the exit code."""
    prog = "python -m raymill.orchestration.tracker"
    parser = argparse.ArgumentParser(prog=prog, description="Deliver a run's events to MLflow.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--give-up-s", type=float, default=600.0, help="seconds to go on trying once the run is over")
    arguments = parser.parse_args(argv)
    folder = RunFolder(arguments.run_folder.resolve())
    os.environ["RAYMILL_HOME"] = str(folder.path.parent.parent)
    from raymill.models.registration import register
    from raymill.tracking.mlflow_sync import follow

    return follow(folder, register, arguments.give_up_s)


if __name__ == "__main__":
    sys.excepthook = print_redacted
    sys.exit(main())
