"""The trial of a run's code in a process of its own, which is gone again before the run's first step.

    python -m raymill.preflight.process     RUN_FOLDER on stdin, which it reads when all that it needs is imported

It takes turns behind whatever else starts, and tells what it found as one JSON list on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from raymill.checkpoint.directory import WEIGHTS, read_pointer
from raymill.config import load
from raymill.config.plan import Plan
from raymill.config.spec import JobSpec
from raymill.data import manifest
from raymill.errors import Problem
from raymill.files import private, read_record
from raymill.paths import project_root
from raymill.record import fitted
from raymill.record.folder import RunFolder
from raymill.record.processes import take_turns_behind
from raymill.trained.model import read_inputs
from raymill.training.assembly import Job, assemble

ready: Trial | None = None
"""A process that this one has started before it knew its run; see `cluster.on_head.ready`."""

NICENESS = 5
"""The run that starts beside it goes first."""

END_TIMEOUT_S = 5.0

Look = Callable[[bool], None]
"""Raises `Refusal` where the job's own code was found wrong. Is told whether there was a step, after which it ends."""


class Refusal(Exception):
    """The job's own code is wrong, and no step was taken: nothing is to be kept of the run.

    Args:
        problems: all that was found.
    """

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems


def no_look(trained: bool) -> None:
    """A look that finds nothing."""


def here(job: Job, where: Callable[[str], str], weights: Path | None) -> Look:
    """Try a job's code in this process, whenever the look is called; `weights` as for `trial.find_problems`."""

    def look(trained: bool) -> None:
        from raymill.preflight.trial import find_problems

        if not trained and (found := find_problems(job, weights)):
            raise Refusal(placed(found, where))

    return look


@contextmanager
def beside(folder: RunFolder, where: Callable[[str], str]) -> Iterator[Look]:
    """Try the code of a run, whose folder holds its records, in a process that ends with the context at the latest."""
    global ready
    trial, ready = ready or Trial(), None
    trial.begin(folder)

    def look(trained: bool) -> None:
        if trained:
            trial.kill()
        elif found := trial.found():
            raise Refusal(placed(found, where))

    try:
        yield look
    finally:
        trial.end()


class Trial:
    """The process that tries the code of a run. It must be ended."""

    def __init__(self) -> None:
        """Start it; it does not know the run yet."""
        self._held = ExitStack()
        self._told = self._held.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "raymill.preflight.process"],
            cwd=project_root(),
            # A fault that a test provokes is for the run.
            env={name: value for name, value in os.environ.items() if name != "RAYMILL_FAULT"},
            stdin=subprocess.PIPE,
            stdout=self._told,
            start_new_session=True,
        )
        take_turns_behind(self._process.pid, NICENESS)

    def begin(self, folder: RunFolder) -> None:
        """Say which run it is, whose folder holds its records. A process that has died finds nothing."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError), self._process.stdin as said:
                said.write(bytes(folder.path))

    def found(self) -> list[Problem]:
        """What is wrong, once that is known."""
        if self._process.poll() != 0:
            return []
        self._told.seek(0)
        return [Problem(**values) for values in json.loads(self._told.read() or b"[]")]

    def kill(self) -> None:
        """Nobody wants to know any more."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process if it goes on, and wait for its end."""
        self._process.kill()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.wait(END_TIMEOUT_S)
        self._held.close()


def newest_weights(folder: RunFolder) -> Path | None:
    """The file with the weights that a run goes on with; None: it has no checkpoint."""
    pointer = read_pointer(folder.checkpoints)
    return None if pointer is None else folder.checkpoints / pointer.latest / WEIGHTS


def placed(problems: Sequence[Problem], where: Callable[[str], str]) -> tuple[Problem, ...]:
    """The problems; those at a field of the job, where its user wrote it."""
    sections = {info.alias or name for name, info in JobSpec.model_fields.items()}
    return tuple(replace(one, where=where(one.where)) if one.where.partition(".")[0] in sections else one for one in problems)


def main() -> int:
    """Tell what is wrong with the code of a run; returns 0."""
    told = os.fdopen(os.dup(1), "w")
    # What the job's code prints, from C too, is not what was found.
    os.dup2(2, 1)
    from raymill import startup_gc  # noqa: F401  # it changes how the whole process collects garbage
    from raymill.preflight.trial import find_problems

    if not (said := sys.stdin.buffer.read()):
        return 0
    folder = RunFolder(Path(os.fsdecode(said)))
    with open(folder.ray_log, "ab", opener=private) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    spec = JobSpec.model_validate(read_record(folder.spec))
    planned = Plan.from_record(read_record(folder.plan))
    taken = manifest.from_record(read_record(folder.data_manifest))
    kept = fitted.read(folder.path)
    parts = spec, planned, taken, load.import_pipeline(spec, kept), planned.num_workers
    job = assemble(*parts, fitted=kept, inputs=read_inputs(folder.path))
    json.dump([problem.as_dict() for problem in find_problems(job, newest_weights(folder))], told)
    told.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
