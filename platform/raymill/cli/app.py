"""The command `raymill`: its verbs, gathered from one file per group."""

from __future__ import annotations

import typer

from raymill import ending_gc  # noqa: F401  # the process ends faster
from raymill.cli import cluster, data, jobs, models, runs
from raymill.cli.tune import tune

app = typer.Typer(
    help="Distributed PyTorch training on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (jobs.init, jobs.check, jobs.plan, jobs.train, tune, jobs.list_jobs, models.evaluate, models.predict, models.ui):
    app.command(name="jobs" if command is jobs.list_jobs else None)(command)
for about_submitted in (cluster.submit, cluster.ps, cluster.logs, cluster.attach, cluster.stop):
    app.command()(about_submitted)
app.add_typer(cluster.app, name="cluster")
app.add_typer(runs.app, name="runs")
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")


def main() -> None:
    """Run the command line; exits with 0 done, 1 failed, 2 the user's input is wrong, 3 interrupted and resumable."""
    app()
