"""The verbs about runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from raymill.cli.output import JsonOption, duration, emit, errors, moment, show_table, show_values
from raymill.redaction import for_people

app = typer.Typer(help="Browse runs.", no_args_is_help=True)

MOST_EVALUATIONS = 20
"""Lines of the history that are shown."""


@app.command("list")
def list_runs(json_: JsonOption = False) -> None:
    """List the runs of this project, newest first."""
    with errors(json_):
        from raymill.record import catalog

        found = catalog.list_runs()
        columns = ("run", "status", "started", "took", "workers", "step", "metric", "last", "best")
        emit({"runs": found}, json_, lambda console: show_table(console, columns, map(_row, found)))


def _row(facts: dict[str, Any]) -> tuple[object, ...]:
    metric, last, best = _telling_metric(facts), _last_metrics(facts), facts["best"]
    return (
        *(facts["run_id"], facts["status"], moment(facts["started_s"]), duration(facts["duration_s"])),
        *(
            facts["num_workers"],
            _progress(facts),
            metric,
            last.get(metric or ""),
            best["metrics"].get(metric or "") if best else None,
        ),
    )


def _last_metrics(facts: dict[str, Any]) -> dict[str, float]:
    """The latest value of each metric; `metrics` of a finished run are those of its best checkpoint."""
    return {**facts["metrics"], **(facts["last"]["metrics"] if facts["last"] else {})}


def _telling_metric(facts: dict[str, Any]) -> str | None:
    """The one metric that stands for a run in a list: what decides about its checkpoints, else of validation, else any."""

    def rank(name: str) -> tuple[bool, bool, str]:
        return name != facts["checkpoint_metric"], not name.startswith("validation/"), name

    return min(facts["metrics"], key=rank, default=None)


def _progress(facts: dict[str, Any]) -> str:
    total = facts["num_total_steps"]
    return str(facts["step"]) if total is None else f"{facts['step']}/{total}"


@app.command("show")
def show_run(run: Annotated[str, typer.Argument(help="run id")], json_: JsonOption = False) -> None:
    """Show one run."""
    with errors(json_):
        from raymill.record import catalog

        found = catalog.show_run(run)
        emit(found, json_, lambda console: _show(console, found))


def _show(console: Console, facts: dict[str, Any]) -> None:
    values = {
        "run": facts["run_id"],
        "job": facts["name"],
        "status": facts["status"],
        "started": moment(facts["started_s"]),
        "took": duration(facts["duration_s"]),
        "attempts": facts["attempts"],
        "workers": facts["num_workers"],
        "step": _progress(facts),
        **{f"last {name}": value for name, value in sorted(_last_metrics(facts).items())},
        "model": facts["version"],
        "MLflow run": facts["mlflow_run_id"],
        "its code": facts["code"],
        **facts["given"],
        **({"damaged lines": facts["damaged_lines"]} if "damaged_lines" in facts else {}),
    }
    show_values(console, values)
    show_evaluations(console, facts["evaluations"], facts["checkpoint_metric"])
    if facts["message"]:
        console.print(f"\n{for_people(facts['message'])}", soft_wrap=True)


def show_evaluations(console: Console, evaluations: list[dict[str, Any]], checkpoint_metric: str | None) -> None:
    """Print the history of the validation: a line for each of the last evaluations and for the best one.

    Args:
        evaluations: see `raymill.record.catalog.evaluations`.
        checkpoint_metric: comes first, if it was measured.
    """
    from raymill.orchestration.progress import history

    columns, rows = history(evaluations, checkpoint_metric, MOST_EVALUATIONS)
    if rows:
        console.print()
        show_table(console, columns, rows)
