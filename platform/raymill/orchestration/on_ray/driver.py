"""The process that drives one attempt on Ray: Ray itself, Ray Train, and the end of the run's story in its folder.

    python -m raymill.orchestration.on_ray.driver RUN_FOLDER [--stand-by PIPE]

It is a process of its own so that its death, whatever the cause, is only one more reason for another to go on; `supervisor`
sees to that. All that it has to say stands in the run's folder: events, summary, and `failure.json` for why it ended.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from raymill import errors, faults
from raymill.config.plan import Plan
from raymill.config.spec import JobSpec
from raymill.errors import RaymillError, RunError
from raymill.files import read_record, write_record
from raymill.orchestration.on_ray import ray_session
from raymill.orchestration.on_ray.session_folder import VARIABLE
from raymill.orchestration.on_ray.turn import Turn
from raymill.orchestration.summary import conclude
from raymill.record.events import StageReached, append_event
from raymill.record.folder import RunFolder
from raymill.redaction import print_redacted, redact

FINISHED, FAILED, INTERRUPTED = 0, 1, 3


def main(arguments: list[str]) -> int:
    """Drive one attempt; returns 0 finished, 3 interrupted, 1 anything else, with the reason in `failure.json`."""
    folder = RunFolder(Path(arguments[0]))
    turn = Turn(folder, Path(os.environ[VARIABLE]), arguments)
    _stop_on_sigterm(folder, turn)
    try:
        with turn:
            return _drive(folder, turn)
    except RaymillError as error:
        _tell(folder, turn, error)
        return FAILED
    except Exception as error:
        # A fault of our own: its traceback goes to the log, its text to the user.
        _tell(folder, turn, RunError(f"{type(error).__name__}: {error}"))
        raise


def _tell(folder: RunFolder, turn: Turn, error: RaymillError) -> None:
    """Write down why the attempt failed, if it was to be this driver's turn; the supervisor does not wait for more."""
    if turn.is_given and not folder.failure.exists():
        write_record(folder.failure, redact(errors.as_record(error)))


def _stop_on_sigterm(folder: RunFolder, turn: Turn) -> None:
    """Answer SIGTERM by asking the workers to save and stop; without a turn there is nothing to save."""

    def stop(number: int, frame: Any) -> None:
        if not turn.has_come:
            raise SystemExit(FAILED)
        folder.stop_request.touch()

    signal.signal(signal.SIGTERM, stop)


def _drive(folder: RunFolder, turn: Turn) -> int:
    # Imported here: it changes how the whole process collects garbage, and the supervisor's imports this file too.
    from raymill import startup_gc

    spec = JobSpec.model_validate(read_record(folder.spec))
    planned = Plan.from_record(read_record(folder.plan))
    # Importing what is needed next while the cluster starts saves its time.
    with ray_session.ray_for(planned, meanwhile=lambda: importlib.import_module("raymill.orchestration.on_ray.ray_trainer")):
        # Imported here: `ray_for` sets what Ray reads when it is imported.
        from raymill.orchestration.on_ray import ray_trainer

        startup_gc.finish()
        # Ray has put its own handler there, which ends the process at once.
        _stop_on_sigterm(folder, turn)
        faults.point("ray_started")
        if turn.has_come:
            append_event(folder, StageReached(stage="starting the workers"))
        try:
            outcome = ray_trainer.fit(folder, planned, spec)
        except RaymillError as error:
            # Before Ray is shut down, which takes a while.
            _tell(folder, turn, turn.refused or error)
            raise
    conclude(folder, planned, spec, outcome)
    return INTERRUPTED if outcome.status == "interrupted" else FINISHED


if __name__ == "__main__":
    sys.excepthook = print_redacted
    sys.exit(main(sys.argv[1:]))
