"""The process that drives one attempt on Ray: Ray itself, Ray Train, and the end of the run's story in its folder.

    python -m raymill.orchestration.on_ray.driver RUN_FOLDER [--stand-by PIPE]
    python -m raymill.orchestration.on_ray.driver --group GROUP --stand-by PIPE     the run is told when its turn comes

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
from raymill.errors import RaymillError, RunError
from raymill.files import write_record
from raymill.orchestration.on_ray import ray_session
from raymill.orchestration.on_ray.group import GROUP, Group, planned_run
from raymill.orchestration.on_ray.session_folder import VARIABLE
from raymill.orchestration.on_ray.turn import Turn
from raymill.orchestration.summary import conclude
from raymill.record.events import StageReached, append_event
from raymill.record.folder import RunFolder
from raymill.redaction import print_redacted, redact

FINISHED, FAILED, INTERRUPTED = 0, 1, 3


def main(arguments: list[str]) -> int:
    """Drive one attempt; returns 0 finished, 3 interrupted, 1 anything else, with the reason in `failure.json`."""
    group = Group.from_text(arguments[arguments.index(GROUP) + 1]) if GROUP in arguments else None
    turn = Turn(None if group else RunFolder(Path(arguments[0])), Path(os.environ[VARIABLE]), arguments)
    _stop_on_sigterm(turn)
    try:
        with turn:
            return _drive(turn, group)
    except RaymillError as error:
        _tell(turn, error)
        return FAILED
    except Exception as error:
        # A fault of our own: its traceback goes to the log, its text to the user.
        _tell(turn, RunError(f"{type(error).__name__}: {error}"))
        raise


def _tell(turn: Turn, error: RaymillError) -> None:
    """Write down why the attempt failed, if it was to be this driver's turn; the supervisor does not wait for more."""
    if turn.is_given and turn.folder is not None and not turn.folder.failure.exists():
        write_record(turn.folder.failure, redact(errors.as_record(error)))


def _stop_on_sigterm(turn: Turn) -> None:
    """Answer SIGTERM by asking the workers to save and stop; without a turn there is nothing to save."""

    def stop(number: int, frame: Any) -> None:
        if not turn.has_come or turn.folder is None:
            raise SystemExit(FAILED)
        turn.folder.stop_request.touch()

    signal.signal(signal.SIGTERM, stop)


def _drive(turn: Turn, group: Group | None) -> int:
    # Imported here: it changes how the whole process collects garbage, and the supervisor's imports this file too.
    from raymill import startup_gc

    planned = planned_run(turn.folder)[0] if turn.folder else None
    # Importing what is needed next while the cluster starts saves its time.
    with ray_session.ray_for(planned, meanwhile=lambda: importlib.import_module("raymill.orchestration.on_ray.ray_trainer")):
        # Imported here: `ray_for` sets what Ray reads when it is imported.
        from raymill.orchestration.on_ray import ray_trainer

        startup_gc.finish()
        # Ray has put its own handler there, which ends the process at once.
        _stop_on_sigterm(turn)
        faults.point("ray_started")
        if turn.has_come and turn.folder is not None:
            append_event(turn.folder, StageReached(stage="starting the workers"))
        try:
            folder, outcome = ray_trainer.fit(turn, group)
        except RaymillError as error:
            # Before Ray is shut down, which takes a while.
            _tell(turn, turn.refused or error)
            raise
    conclude(folder, *planned_run(folder), outcome)
    return INTERRUPTED if outcome.status == "interrupted" else FINISHED


if __name__ == "__main__":
    sys.excepthook = print_redacted
    sys.exit(main(sys.argv[1:]))
