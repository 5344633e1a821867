"""The Python door: what the command line can do, through the same functions. `import raymill` leads here."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill.config import load as job_files
from raymill.config.plan import Plan
from raymill.config.spec import JobSpec
from raymill.errors import InputError, Problem
from raymill.orchestration import executors
from raymill.orchestration import run as runner
from raymill.orchestration.attempts import Show
from raymill.orchestration.prepare import Prepared, prepare
from raymill.record import catalog
from raymill.record.folder import RunFolder, run_folder
from raymill.task import VALIDATION, Rows

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]
    from rich.console import Console

    from raymill.models.predict import Predictor

ONE_WORKER = ("scale.workers=1", "scale.min_workers=null", "scale.max_workers=null")


# ---------------------------------------------------------------- jobs


def load(job: str | Path, **overrides: Any) -> Job:
    """A job of this project.

    Args:
        job: a job file, its folder, or the name of a folder in jobs/.
        overrides: field paths with "__" for ".", as in `loop__epochs=2`; a whole section may be given as a dict.

    Raises:
        InputError: there is no such job, or too little of it is right to go on with.
    """
    given = _overrides(overrides)
    return Job(str(job), tuple(given), job_files.examine_job(str(job), given).spec)


def _overrides(given: Mapping[str, Any]) -> list[str]:
    return [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in given.items()]


@dataclass(frozen=True)
class Job:
    """A job file with overrides. It is read again, and checked, by each method.

    Attributes:
        name: the file, its folder, or its name.
        overrides: "field.path=value" each.
        spec: the typed job. Where something is wrong with a field, its default; `check` says so.
    """

    name: str
    overrides: tuple[str, ...]
    spec: JobSpec

    def check(self, *, run: bool = False) -> dict[str, int]:
        """Check the job and its data against this machine, or the cluster that RAY_ADDRESS names; returns the rows of each split.

        Args:
            run: also try the job's own code on a few rows, in this process.

        Raises:
            InputError: with everything that is wrong.
        """
        prepared = self._prepare()
        if run:
            runner.try_code(prepared)
        return {split: part.num_rows for split, part in prepared.manifest.splits.items()}

    def plan(self) -> Plan:
        """Every derived number, with its reason.

        Raises:
            InputError: with everything that is wrong.
        """
        return self._prepare().plan

    def train(self, *, in_process: bool = False, quiet: bool = False, preflight: bool = True) -> Run:
        """Train to the end; shows progress unless `quiet`.

        Args:
            in_process: in this process, with one worker, without Ray. Otherwise on the cluster that RAY_ADDRESS names, or on an
                embedded Ray with the job's number of workers.
            preflight: try the job's own code on a few rows, before or while the run starts.

        Raises:
            InputError: with everything that is wrong.
            Interrupted: stopped on request, to be resumed.
            RunError: the run could not go on.
        """
        summary = train_job(
            self.name,
            self.overrides,
            in_process=in_process,
            preflight=preflight,
            console=_console(quiet),
            started_s=time.time(),
        )
        return Run(summary["run_id"])

    def tune(self, *, trials: int | None = None, new: bool = False, quiet: bool = False) -> pd.DataFrame:
        """Search over the job's fields, as its `search:` says, or search.yaml beside it; shows trials unless `quiet`.

        Args:
            trials: in place of the search's own number.
            new: begin anew, whatever was begun before; else a search that is not over goes on.

        Returns:
            The trials by number: state, value, deviation, seconds, the fields of the space, message. `attrs["summary"]` is what
            the command prints.

        Raises:
            InputError: with everything that is wrong with the job, its search and each corner of the space.
            SearchStopped: on request; the same call goes on.
            RunError: the search could not go on.
        """
        import pandas as pd

        from raymill.tune import outcome
        from raymill.tune.command import Asked, tune, with_trials
        from raymill.tune.folder import find_study

        console = _console(quiet)

        def say(line: object) -> None:
            if console is not None:
                console.print(line, highlight=False, soft_wrap=True)

        asked = Asked(self.name, with_trials(self.overrides, trials), new=new)
        summary = tune(asked, lambda trial: say(outcome.in_a_line(trial)), say)
        columns, rows = outcome.table(find_study(summary["study"]))
        table = pd.DataFrame(rows, columns=columns).set_index("number")
        table.attrs["summary"] = summary
        return table

    def _prepare(self) -> Prepared:
        facts = executors.choose(this_process=False).find_facts()
        return prepare(job_files.examine_job(self.name, self.overrides), facts)


def train_job(
    job: str,
    overrides: Sequence[str],
    *,
    in_process: bool,
    preflight: bool,
    console: Console | None,
    started_s: float,
    run_id: str | None = None,
) -> dict[str, Any]:
    """Train a job to the end.

    Args:
        job: see `load`.
        overrides: "field.path=value" each.
        in_process, preflight: see `Job.train`.
        console: where progress is shown; None: nowhere.
        started_s: when the command was given, Unix seconds.
        run_id: what the run is called; None: by the job's name, the time and something at random.

    Returns:
        The summary.

    Raises:
        InputError, Interrupted, RunError: see `Job.train`.
    """
    executor = executors.choose(this_process=in_process)
    if executor.only_one_worker:
        _refuse_workers(next((text for text in reversed(overrides) if text.startswith("scale.workers=")), None))
        overrides = [*overrides, *ONE_WORKER]
    prepared = prepare(job_files.examine_job(job, overrides), executor.find_facts())
    with ExitStack() as stack:
        watch = _watch(stack, console, in_process)
        return runner.train(prepared, executor, watch, started_s, preflight=preflight, run_id=run_id)


def _refuse_workers(asked: str | None) -> None:
    if asked is not None and asked != ONE_WORKER[0]:
        fix = "Leave one of the two out."
        raise InputError([Problem("--in-process", asked, "one worker, which is all that this process has", fix)])


# ---------------------------------------------------------------- runs


def runs() -> list[Run]:
    """The runs of this project, newest first."""
    return [Run(facts["run_id"]) for facts in catalog.list_runs()]


def run(run_id: str) -> Run:
    """One run of this project.

    Raises:
        InputError: there is none of this id; names the nearest.
    """
    return Run(catalog.find_run(run_id).run_id)


def resume(
    run_id: str,
    *,
    workers: int | None = None,
    in_process: bool = False,
    accept_code_changes: bool = False,
    quiet: bool = False,
    preflight: bool = True,
    **overrides: Any,
) -> Run:
    """Go on with an interrupted or failed run from its last checkpoint; errors as those of `Job.train`.

    Args:
        workers: another number of workers; None: the same.
        in_process: in this process, whatever it was begun on.
        accept_code_changes: go on though the job's own code is another one now; the weights will be others too.
        preflight: see `Job.train`.
        overrides: as in `load`, of the fields that may change when a run goes on; see `raymill.config.resumed`.
    """
    resume_run(
        run_id,
        workers,
        _overrides(overrides),
        in_process=in_process,
        accept_code_changes=accept_code_changes,
        preflight=preflight,
        console=_console(quiet),
        started_s=time.time(),
    )
    return Run(run_id)


def resume_run(
    run_id: str,
    workers: int | None,
    overrides: Sequence[str],
    *,
    in_process: bool,
    accept_code_changes: bool,
    preflight: bool,
    console: Console | None,
    started_s: float,
) -> dict[str, Any]:
    """See `resume` and `train_job`; returns the summary."""
    executor = executors.choose(this_process=in_process)
    if executor.only_one_worker and workers is not None:
        _refuse_workers(f"scale.workers={workers}")
    with ExitStack() as stack:
        watch = _watch(stack, console, in_process)
        return runner.resume(
            run_id,
            workers,
            overrides,
            executor,
            watch,
            started_s,
            accept_code_changes=accept_code_changes,
            preflight=preflight,
        )


@dataclass(frozen=True)
class Run:
    """One run. What it says is read from the run's folder each time."""

    run_id: str

    @property
    def status(self) -> str:
        """As in `raymill.record.catalog.show_run`: "running", "finished", "interrupted", "failed" and so on."""
        return str(self.facts()["status"])

    @property
    def metrics(self) -> dict[str, float]:
        """The latest value of each metric."""
        return dict(self.facts()["metrics"])

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return run_folder(self.run_id).path

    @property
    def summary(self) -> dict[str, Any] | None:
        """The result, once there is one: metrics, rows used and skipped, weights_sha256, model, and more."""
        from raymill.files import read_record

        path = run_folder(self.run_id).summary
        return read_record(path) if path.exists() else None

    def facts(self) -> dict[str, Any]:
        """What is known of the run; see `raymill.record.catalog.show_run`."""
        return catalog.show_run(self.run_id)

    def history(self) -> pd.DataFrame:
        """The metrics by step: an index `step`, the columns epoch, time_s and one per metric, NaN where it was not measured."""
        import pandas as pd

        entries = catalog.history(self.run_id)
        return pd.DataFrame(entries, columns=None if entries else ["step", "epoch", "time_s"]).set_index("step")

    def model(self) -> Model:
        """The best weights of the run."""
        return model(self.run_id)


# ---------------------------------------------------------------- models


def registered_models() -> list[dict[str, Any]]:
    """The registered models: name, aliases (alias -> version), versions (newest first), updated_s.

    Raises:
        TrackingError: the registry cannot be reached.
    """
    from raymill.models import registry

    return registry.list_models()


def model(reference: str) -> Model:
    """A trained model: `name@alias`, `name/version`, or the id of a run for its best checkpoint.

    Raises:
        InputError: there is none; names the nearest.
        CheckpointError: its files are damaged or were changed.
    """
    from raymill.models.predict import Predictor

    predictor = Predictor.load(reference)
    if changed := predictor.trained.code_changes():
        what = ", ".join(map(str, changed))
        warnings.warn(f"{reference} was trained with other code than today's, which runs now: {what}", stacklevel=2)
    return Model(reference, predictor)


@dataclass(frozen=True)
class Model:
    """A trained model, in this process."""

    reference: str
    _predictor: Predictor

    @property
    def spec(self) -> JobSpec:
        """The job that trained it."""
        return self._predictor.trained.spec

    def predict(self, rows: Rows) -> Rows:
        """What the model says of rows, in their order: `Task.predict`, or else what `forward` returns for `Task.inputs`.

        Args:
            rows: column -> one value per row, as the pipeline's sources give them; the pipeline's targets may be left out.

        Returns:
            name -> an array [num_rows, ...], or a list with an array of any shape, a `str` or `bytes` per row. What a forward
            pass returns without a name is "output".

        Raises:
            InputError: the rows do not fit the pipeline's schema.
        """
        return self._predictor.predict(rows)

    def evaluate(self, split: str = VALIDATION) -> Mapping[str, Any]:
        """Exact metrics on a split of the job's rows; see `raymill.models.evaluate.evaluate`."""
        from raymill.models.evaluate import evaluate

        return evaluate(self.reference, split)


# ---------------------------------------------------------------- showing


def _console(quiet: bool) -> Console | None:
    if quiet:
        return None
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False)


def _watch(stack: ExitStack, console: Console | None, in_process: bool) -> runner.Watch:
    def watch(folder: RunFolder) -> Show:
        if console is None:
            return lambda event: None
        from raymill.orchestration.progress import Progress

        console.print(f"run {folder.run_id}", highlight=False)
        console.print(f"its files: {folder.path}", highlight=False, soft_wrap=True)
        # On a terminal, the job's own code may print or stop at a breakpoint in between.
        return stack.enter_context(Progress(console, live=console.is_jupyter or not in_process)).show

    return watch
