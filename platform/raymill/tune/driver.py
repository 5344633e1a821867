"""The process that drives a search: a Ray of its own (or a cluster's), on which Ray Tune runs the trials.

    python -m raymill.tune.driver     {"study": STUDY_FOLDER, "parallel": TRIALS_AT_ONCE or null} on stdin

Ray Tune finds room for trials, keeps their actors warm from one to the next, and starts lost ones again; what they try and which
end early comes from the study, whose store is all that is kept. So this process may be killed at any moment: another goes on.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from optuna.trial import FrozenTrial

from raymill import ending_gc, errors  # noqa: F401  # the process ends faster
from raymill.config.plan import Plan
from raymill.config.search import SearchSpec
from raymill.config.spec import JobSpec
from raymill.errors import RaymillError, RunError
from raymill.files import private, read_record, replace_file, run_lock, write_record
from raymill.orchestration.on_ray.ray_session import ray_for
from raymill.orchestration.on_ray.session_folder import VARIABLE, held_by_driver
from raymill.paths import home, in_this_copy, project_root
from raymill.redaction import print_redacted, redact, redact_text
from raymill.tune.folder import FAILED, FINISHED, INTERRUPTED, UNWRITABLE, StudyFolder
from raymill.tune.outcome import NUM_SHOWN, conclude
from raymill.tune.study import DEVIATION, MESSAGE, METRICS, RUNS, SECONDS, STEP, Study, Suggestion, Wait, facts_of, store_problem
from raymill.tune.trial import TrialSpec

WATCH_S = 1.0

MOST_DEATHS = 3
"""Of a trial's process; each time the trial goes on from its last commit."""

SETTINGS = {
    # Ray Tune's own result files and TensorBoard's: a third of the time of a short trial.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial that failed has no value.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # What is kept of a search is the study.
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    # A trial that ends early saves its state first.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
}
"""Of Ray Tune."""


class Search:
    """What Ray Tune asks and tells: the study, its budget, and what becomes of each trial. Called in one thread."""

    def __init__(self, folder: StudyFolder, parallel: int | None = None) -> None:
        """Of a study that was prepared; with no more trials at once than `parallel`, whatever it says itself."""
        record = read_record(folder.record)
        self.folder, self.record = folder, record
        self.search = SearchSpec.model_validate(record["search"])
        self.spec = JobSpec.model_validate(record["spec"])
        self.parallel = min((most for most in (self.search.parallel, parallel) if most), default=None)
        self.metric, self.mode = record["metric"], record["mode"]
        self.study = Study(folder.store, folder.name, self.search, self.mode, record["first"])
        self.failed: str | None = None
        self._begun_s, self._over_before = time.monotonic(), num_over(self.study.trials())
        self._deaths: Counter[int] = Counter()

    @property
    def num_workers(self) -> int:
        """Of each run of a trial."""
        return self.search.workers or self.spec.scale.max_num_workers

    @property
    def in_process(self) -> bool:
        """Whether a trial's runs have one worker, and so need no process but the actor's."""
        return self.num_workers == 1

    def next(self) -> TrialSpec | Wait | None:
        """The next trial; None: there is none to begin."""
        with self._noting_failures():
            if self.is_over():
                return None
            suggestion = self.study.next(self.record["trials"])
        return self._spec_of(suggestion) if isinstance(suggestion, Suggestion) else suggestion

    def _spec_of(self, suggestion: Suggestion) -> TrialSpec:
        from raymill.tune.space import as_overrides

        fixed = ["register=null", "search=null", *self.record["overrides"]]
        if self.in_process or self.search.workers:
            fixed += [f"scale.workers={self.num_workers}", "scale.min_workers=null", "scale.max_workers=null"]
        if self.in_process and self.spec.loop.threads is None:
            # As many trials run at once as there are CPUs.
            fixed.append("loop.threads=1")
        repeats = self.search.repeats(self.spec.loop.seed)
        name = f"{self.folder.name}-{suggestion.number:04d}"
        ids = [name] if len(repeats) == 1 else [f"{name}.{number}" for number in range(len(repeats))]
        values, parent = as_overrides(suggestion.values), None
        stop_after = None
        if self.search.scheduler.kind == "pbt":
            size = self.search.scheduler.population
            generation, generations = suggestion.number // size, self.record["trials"] // size
            # The last one runs to its end, and so concludes as any run.
            stop_after = self.search.scheduler.grace if generation < generations - 1 else None
            # Others go on from the checkpoint of the last evaluation, behind which there may be some more.
            fixed.append(f"checkpoint.keep={max(self.spec.checkpoint.keep, 4)}")
        if suggestion.parent is not None:
            parent = f"{self.folder.name}-{suggestion.parent:04d}"
            begins = {"model": parent, "take": "all", "step": suggestion.step}
            values.append(f"init_from={json.dumps(begins)}")
        return TrialSpec(
            study=self.folder.name,
            number=suggestion.number,
            project=str(project_root()),
            job=self.here(self.record["job"]),
            runs={run_id: [*fixed, *values, *own] for run_id, own in zip(ids, repeats, strict=True)},
            metric=self.metric,
            measured=[*self.search.also, *self.search.limits],
            cwd=self.here(self.record["cwd"]),
            in_process=self.in_process,
            stop_after=stop_after,
            parent=parent,
        )

    def here(self, path: str) -> str:
        """A path of the project as it was when the search began, in the copy in which it goes on."""
        return in_this_copy(path, self.record.get("project", ""))

    def report(self, number: int, evaluation: int, value: float) -> bool:
        """A trial was evaluated, for the first, second, ... time; returns whether it is to end."""
        with self._noting_failures():
            return self.study.report(number, evaluation, value)

    def ended(self, number: int, result: dict[str, Any] | None, *, pruned: bool) -> None:
        """A trial is over: note it, unless the search was stopped and the trial is to be gone on with."""
        with self._noting_failures():
            self._ended(number, result or {}, pruned=pruned)

    @contextmanager
    def _noting_failures(self) -> Iterator[None]:
        """Within this the study is read and written. What goes wrong ends the search: Ray Tune may take it for a trial's."""
        try:
            yield
        except Exception as failure:
            said = f"the study could not be written: {type(failure).__name__}: {failure}. The same command goes on."
            self.failed = store_problem(failure, self.folder.store) or said
            raise

    def _ended(self, number: int, result: dict[str, Any], *, pruned: bool) -> None:
        facts = {RUNS: result.get("runs", [f"{self.folder.name}-{number:04d}"])}
        if "metrics" in result:
            metrics = result["metrics"]
            facts |= {METRICS: metrics, SECONDS: result["seconds"], DEVIATION: result["deviation"], STEP: result["step"]}
            values = [metrics[name] for name in (self.metric, *self.search.also)]
            self.study.tell(number, "complete", values, facts, self.search.breaks(metrics))
        elif pruned:
            self.study.tell(number, "pruned", None, facts)
        elif self.is_stopped():
            return
        elif "no_room" in result:
            # No fault of the trial's: it goes on once there is some, and so do all others.
            self.failed = f"trial {number} found no room on the disk: {result['no_room']}. Free some; the same command goes on."
            return
        elif (not result or result.get("interrupted")) and self._deaths[number] < MOST_DEATHS:
            # Its process died, or was asked to end. Not left to Ray Tune, which knows nothing of what was committed.
            self._deaths[number] += 1
            self.study.again(number)
            return
        else:
            said = result.get("failed", "its process died, and died again when it was started anew; see ray.log of the study")
            self.study.tell(number, "failed", None, {**facts, MESSAGE: redact_text(said)})
            if self.search.on_error == "stop":
                self.failed = f"trial {number} failed, and search.on_error is stop: {said}"
        self._tell_of([one for one in self.study.trials() if one.number == number])

    def _tell_of(self, trials: Sequence[FrozenTrial]) -> None:
        known, most = self.study.trials(), self.record["trials"]
        over, best = num_over(known), self.study.ranked(known)[:NUM_SHOWN]
        took_s = time.monotonic() - self._begun_s
        so_far = {
            "states": dict(Counter(one.state.name.lower() for one in known)),
            "over": over,
            "most_trials": most,
            "left_s": took_s / max(1, over - self._over_before) * max(0, most - over),
            "each_cpus": self.num_workers * (self.spec.scale.cpus_per_worker or 1),
            "top": [{name: facts_of(one)[name] for name in ("number", "value", "values")} for one in best],
        }
        with open(self.folder.trials, "a", opener=private) as file:
            for trial in trials:
                file.write(json.dumps(redact({"time_s": time.time(), **facts_of(trial), "so_far": so_far})) + "\n")

    def tell_what_was_not_told(self) -> None:
        """Tell of trials that an earlier driver has noted in the study, and then died."""
        content = self.folder.trials.read_bytes() if self.folder.trials.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            replace_file(self.folder.trials, whole)
        told = {json.loads(line)["number"] for line in whole.splitlines()}
        self._tell_of([one for one in self.study.trials() if one.state.is_finished() and one.number not in told])

    def is_stopped(self) -> bool:
        """Whether running trials are to end too."""
        return self.folder.stop_request.exists() or self.failed is not None

    def is_over(self) -> bool:
        """Whether no more trials are to begin."""
        hours = self.search.max_hours
        late = hours is not None and time.time() > self.record["begun_s"] + 3600 * hours
        return self.is_stopped() or late or self._has_reached_its_target()

    def _has_reached_its_target(self) -> bool:
        target = self.search.target
        if target is None:
            return False
        best = self.study.best()
        return best is not None and self.study.worth(best.values[0]) >= self.study.worth(target)


def num_over(trials: Sequence[FrozenTrial]) -> int:
    """How many of them have ended."""
    return sum(one.state.is_finished() for one in trials)


def main() -> int:
    """Drive the search that stdin names; returns what became of it, see `folder`."""
    if not (said := sys.stdin.read()):
        # The command was killed before it knew. Whoever is the last in a session removes it.
        with held_by_driver(Path(os.environ[VARIABLE])):
            return INTERRUPTED
    told = json.loads(said)
    folder = StudyFolder(Path(told["study"]))

    def stop(number: int, frame: Any) -> None:
        folder.stop_request.touch()

    signal.signal(signal.SIGTERM, stop)
    try:
        with open(folder.log, "ab", opener=private) as log, open(os.devnull, "rb") as nothing:
            for number, stream in enumerate((nothing, log, log)):
                os.dup2(stream.fileno(), number)
        with run_lock(folder.driver_lock):
            return _drive(folder, told["parallel"])
    except RaymillError as error:
        return _failed(folder, error)
    except Exception as error:
        print_redacted(type(error), error, error.__traceback__)
        return _failed(folder, RunError(f"{type(error).__name__}: {error}"))


def _failed(folder: StudyFolder, error: RaymillError) -> int:
    try:
        write_record(folder.failure, redact(errors.as_record(error)))
    except OSError:
        return UNWRITABLE
    return FAILED


def _drive(folder: StudyFolder, parallel: int | None) -> int:
    plan = Plan.from_record(read_record(folder.plan))
    os.environ |= SETTINGS | {"RAYMILL_HOME": str(home())}
    search = Search(folder, parallel)
    search.tell_what_was_not_told()
    with ray_for(plan, meanwhile=lambda: importlib.import_module("raymill.tune.ray_tune")):
        signal.signal(signal.SIGTERM, lambda number, frame: folder.stop_request.touch())
        threading.Thread(target=_end_with_ray, name="watches Ray", daemon=True).start()
        # Imported here: `ray_for` sets what Ray reads when it is imported.
        from raymill.tune import ray_tune

        try:
            ray_tune.run(search, Path(os.environ[VARIABLE], "tune"))
        except Exception as error:
            if search.failed is None:
                raise
            # What Ray Tune makes of it says less.
            raise RunError(search.failed) from error
        if search.failed is None and not folder.stop_request.exists():
            # Before Ray ends, which takes seconds: what is delivered last can begin.
            conclude(folder, search.study)
    if search.failed is not None:
        raise RunError(search.failed)
    with suppress(FileNotFoundError):
        folder.failure.unlink()
    return INTERRUPTED if folder.stop_request.exists() else FINISHED


def _end_with_ray() -> None:
    """End this process once one of Ray's that it has started is dead: Ray Tune may wait for ever, and another driver goes on."""
    while True:
        time.sleep(WATCH_S)
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process().children()
            if any(one.status() == psutil.STATUS_ZOMBIE and one.name() in ("raylet", "gcs_server") for one in children):
                os._exit(FAILED)


if __name__ == "__main__":
    sys.excepthook = print_redacted
    sys.exit(main())
