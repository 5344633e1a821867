"""What came of a study: its summary, as the command prints it, and what is shown of one that goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from raymill.config.search import SearchSpec
from raymill.errors import InputError, Problem
from raymill.files import read_record, write_record
from raymill.tune.folder import StudyFolder
from raymill.tune.study import Study, facts_of

NUM_SHOWN = 5


def open_study(folder: StudyFolder) -> Study:
    """A study, to be looked at."""
    record = read_record(folder.record)
    return Study(folder.store, folder.name, SearchSpec.model_validate(record["search"]), record["mode"])


def conclude(folder: StudyFolder, study: Study) -> dict[str, Any]:
    """The summary of a study that is over; also written to its folder."""
    summary = show(folder, study)
    write_record(folder.summary, summary)
    return summary


def show(folder: StudyFolder, study: Study | None = None) -> dict[str, Any]:
    """What is known of a study.

    Args:
        study: the same, where it is open already.

    Returns:
        study, job, metric, mode, also, limits, trials (state -> how many), most_trials, best (see `facts_of`), top (the best
        five), front (of several metrics, the trials that no other beats in all), outside (how many broke a limit),
        job_as_it_stands (the value of the first trial, where that is the job), begun_s.
    """
    record, study = read_record(folder.record), study or open_study(folder)
    known = study.trials()
    trials, top = [facts_of(one) for one in known], [facts_of(one) for one in study.ranked(known)[:NUM_SHOWN]]
    first = next((one for one in trials if one["number"] == 0 and one["state"] == "complete"), None)
    return {
        "study": folder.name,
        "job": record["job"],
        "metric": record["metric"],
        "mode": record["mode"],
        "also": study.search.also,
        "limits": {name: limit.model_dump() for name, limit in study.search.limits.items()},
        "trials": dict(Counter(one["state"] for one in trials)),
        "most_trials": record["trials"],
        "best": top[0] if top else None,
        "top": top,
        "front": [facts_of(one) for one in study.front(known)] if study.search.also else [],
        "outside": sum(not one["inside"] for one in trials),
        "job_as_it_stands": first["value"] if first and record["first_is_the_job"] else None,
        "begun_s": record["begun_s"],
    }


def in_a_line(trial: dict[str, Any]) -> str:
    """A trial that is over, as it is shown: the facts of it, and `so_far`, what the driver knew of the search by then."""
    values = "  ".join(f"{name} {_short(value)}" for name, value in trial["values"].items())
    took = f", {trial['seconds']:.3g} s" if trial["seconds"] else ""
    said = f"\n{trial['message']}" if trial["message"] else ""
    so_far = trial["so_far"]
    best = so_far["top"][0]["value"] if so_far["top"] else None
    where = f"{so_far['over']} of {so_far['most_trials']}, best {_short(best)}, ETA {so_far['left_s']:.0f} s"
    return f"trial {trial['number']}  {trial['state']}  {_short(trial['value'])}{took}  {values}  ({where}){said}"


def standing(so_far: dict[str, Any]) -> str:
    """How a search stands, in a line: trials by state, what they have of the cluster, the time that is left."""
    states = ", ".join(f"{count} {state}" for state, count in sorted(so_far["states"].items()))
    cpus = so_far["states"].get("running", 0) * so_far["each_cpus"]
    return f"{so_far['over']} of {so_far['most_trials']} trials: {states} on {cpus:g} CPUs; ETA {so_far['left_s']:.0f} s"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def table(folder: StudyFolder) -> tuple[list[str], list[list[Any]]]:
    """All trials as a table: names of columns, rows."""
    study = open_study(folder)
    trials = [facts_of(one) for one in study.trials()]
    fields = sorted({name for one in trials for name in one["values"]})
    beside = list(dict.fromkeys([*study.search.also, *study.search.limits]))
    columns = ["number", "state", "value", *beside, "deviation", "seconds", *fields, "message"]
    rows = [{**one, **{name: one["metrics"].get(name) for name in beside}, **one["values"]} for one in trials]
    return columns, [[row.get(name) for name in columns] for row in rows]


def best_run(summary: dict[str, Any]) -> str:
    """The run of the best trial; of several, the first.

    Raises:
        InputError: no trial ran to its end.
    """
    if not summary["best"]:
        fix = "Look at the trials with `raymill tune show`, and correct the space, the limits or the job."
        raise InputError([Problem("search", "no trial that ran to its end inside the limits", "at least one", fix)])
    runs: Sequence[str] = summary["best"]["runs"]
    return runs[0]
