"""The verbs about jobs: init, check, plan, train, jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from raymill.cli.output import (
    Aligned,
    InProcessOption,
    JobArgument,
    JsonOption,
    SetOption,
    WorkersOption,
    duration,
    emit,
    errors,
    overrides,
    plain_console,
    refuse_unless_one,
    show_table,
)
from raymill.cli.runs import show_evaluations
from raymill.errors import InputError, Problem
from raymill.redaction import for_people

MUCH_WAITING = 0.1
"""The share of an evaluation's time from which on waiting for data is worth a word."""


def init(
    folder: Annotated[Path, typer.Argument(help="the folder to make")],
    from_: Annotated[str, typer.Option("--from", help="the job to begin with, by its name in the catalogue")] = "demo",
    json_: JsonOption = False,
) -> None:
    """Make a project of your own, with a first job that trains."""
    with errors(json_):
        from raymill.project import init_project

        made = init_project(folder, from_)
        next_steps = [f"cd {folder}", f"raymill train {made['job']} --in-process", f"raymill train {made['job']}"]

        def show(console: Console) -> None:
            console.print("\n".join([f"made {folder}", "", "Next:", *(f"  {step}" for step in next_steps)]))

        emit({**made, "next": next_steps}, json_, show)


def check(
    job: JobArgument,
    set_: SetOption = None,
    workers: WorkersOption = None,
    run: Annotated[bool, typer.Option("--run", help="also try the job's own code on a few rows, in this process")] = False,
    json_: JsonOption = False,
) -> None:
    """Validate a job and its data without starting anything."""
    with errors(json_):
        from raymill.config import load
        from raymill.orchestration import executors
        from raymill.orchestration.prepare import prepare

        loaded = load.examine_job(job, overrides(set_, workers))
        prepared = prepare(loaded, executors.choose(this_process=False).find_facts())
        if run:
            from raymill.orchestration.run import try_code

            try_code(prepared)
        rows = {split: part.num_rows for split, part in prepared.manifest.splits.items()}
        emit(
            {"job": prepared.spec.name, "valid": True, "rows": rows, "problems": []},
            json_,
            lambda console: console.print(for_people(f"{loaded.path}: valid; rows: {rows}")),
        )


def plan(job: JobArgument, set_: SetOption = None, workers: WorkersOption = None, json_: JsonOption = False) -> None:
    """Print every derived number of a job with its reason."""
    with errors(json_):
        from raymill.config import load
        from raymill.config.plan import explain
        from raymill.data.arrow import describe
        from raymill.orchestration import executors
        from raymill.orchestration.prepare import prepare

        loaded = load.examine_job(job, overrides(set_, workers))
        prepared = prepare(loaded, executors.choose(this_process=False).find_facts())

        def show(console: Console) -> None:
            table = Table("number", "value", "reason", box=None, header_style="bold")
            for row in explain(prepared.plan):
                table.add_row(*row)
            console.print(table)
            columns = Table("column", "what a row has there", box=None, header_style="bold")
            for name, what in schema.items():
                columns.add_row(for_people(name), what)
            console.print(columns)

        schema = {name: describe(field) for name, field in prepared.pipeline.schema.items()}
        emit({**prepared.plan.as_record(), "schema": schema}, json_, show)


def train(
    job: Annotated[str | None, typer.Argument(help="a job file, its folder, or a name in jobs/; not with --resume")] = None,
    set_: SetOption = None,
    workers: WorkersOption = None,
    resume: Annotated[str | None, typer.Option("--resume", help="id of an interrupted or failed run")] = None,
    in_process: InProcessOption = False,
    accept_code_changes: Annotated[
        bool, typer.Option("--accept-code-changes", help="with --resume: go on though the job's own code changed")
    ] = False,
    preflight: Annotated[bool, typer.Option(help="try the job's own code on a few rows first, or while the run starts")] = True,
    run_id: Annotated[str | None, typer.Option("--run-id", hidden=True, help="what the run is called")] = None,
    given_s: Annotated[
        float | None, typer.Option("--given-s", hidden=True, help="when the command was given, if this process is older")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Run a job: train, track, register."""
    with errors(json_):
        from raymill import api

        refuse_unless_one("train", job, resume)
        if resume is None and accept_code_changes:
            fix = "A new run takes the code as it is: leave the option out."
            raise InputError([Problem("--accept-code-changes", "no --resume", "a run to go on with", fix)])
        console = plain_console(stderr=True)
        started_s = given_s or psutil.Process().create_time()
        how: Any = {"in_process": in_process, "preflight": preflight, "console": console, "started_s": started_s}
        if job is not None:
            summary = api.train_job(job, overrides(set_, workers), run_id=run_id, **how)
        else:
            summary = api.resume_run(str(resume), workers, set_ or [], accept_code_changes=accept_code_changes, **how)
        emit(summary, json_, lambda console: _show_summary(console, summary))
        if "not_registered" in summary:
            # All weights are there, but not the model that was asked for.
            raise typer.Exit(1)


def _show_summary(console: Console, summary: dict[str, Any]) -> None:
    table = Aligned()
    table.add_row("run", summary["run_id"])
    table.add_row("status", summary["status"])
    table.add_row("steps", summary["steps"])
    table.add_row("best step", summary["best_step"])
    for name, value in summary["metrics"].items():
        table.add_row(name, value)
    table.add_row("weights SHA-256", summary["weights_sha256"])
    table.add_row("rows/s", f"{summary['rows_per_s']:,.0f}")
    table.add_row("to the first step", duration(summary["seconds_to_first_step"]))
    table.add_row("rows", ", ".join(f"{name} {count}" for name, count in summary["rows"].items()))
    if summary["degraded"]:
        table.add_row("bad rows", f"{summary['bad_rows']['distinct']} left out ({summary['bad_rows']['policy']})")
    if recoveries := summary["recoveries"]:
        each = ", ".join(f"{one['seconds']:.1f} s" for one in recoveries)
        table.add_row("went on by itself", f"{len(recoveries)} times; from the last step to the next: {each}")
    for change in summary["code_changed"]:
        table.add_row("code", f"{change['file']} {change['kind']} after step {change['after_step']}")
    waited = f"{summary['data_wait_share']:.1%} of the time"
    if summary["evaluation_wait_share"] >= MUCH_WAITING:
        waited += f"; {summary['evaluation_wait_share']:.1%} in evaluations"
    table.add_row("waiting for data", waited)
    model = summary.get("model")
    if model:
        table.add_row("model", f"{model['name']} version {model['version']}, alias {model['alias']}")
        if "not_exported" in model:
            table.add_row("not exported", f"{model['not_exported']}; raymill loads it, MLflow alone does not")
    console.print(table, soft_wrap=True)
    show_evaluations(console, summary["evaluations"], None)
    if "note" in summary:
        console.print(f"\n{for_people(summary['note'])}", soft_wrap=True)
    console.print("\nNext:")
    if model:
        console.print(f"  raymill evaluate {model['name']}@{model['alias']}")
    console.print(f"  raymill runs show {summary['run_id']}\n  raymill ui")


def list_jobs(json_: JsonOption = False) -> None:
    """List the jobs of this project."""
    with errors(json_):
        from raymill.config import catalogue
        from raymill.config.spec import CardSpec

        found = catalogue.list_jobs()
        columns = ("name", "about", "data", "MB", "reaches", "minutes", "valid")
        rows = []
        for job in found:
            card = CardSpec.model_validate(job["card"]) if job["card"] else None
            reached = ", ".join(f"{name} {bound}" for name, bound in card.expect.items()) if card else None
            told = (
                (card.topic, card.data, card.download_mb, reached, card.minutes)
                if card
                else (job["about"], None, None, None, None)
            )
            rows.append([job["name"], *told, job["valid"]])
        emit({"jobs": found}, json_, lambda console: show_table(console, columns, rows))
