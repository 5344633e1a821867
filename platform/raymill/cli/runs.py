"""The verbs about runs."""

from __future__ import annotations

from typing import Annotated

import typer

from raymill.cli.output import JsonOption, emit, errors, show_table, show_values

app = typer.Typer(help="Browse runs.", no_args_is_help=True)


@app.command("list")
def list_runs(json_: JsonOption = False) -> None:
    """List the runs of this project, newest first."""
    with errors(json_):
        from raymill.record import catalog

        found = catalog.list_runs()
        emit({"runs": found}, json_, lambda console: show_table(console, found, ("run_id", "status", "step", "metrics")))


@app.command("show")
def show_run(run: Annotated[str, typer.Argument(help="run id")], json_: JsonOption = False) -> None:
    """Show one run."""
    with errors(json_):
        from raymill.record import catalog

        found = catalog.show_run(run)
        emit(found, json_, lambda console: show_values(console, found))
