"""The verbs about data sets."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console

from raymill.cli.output import JobArgument, JsonOption, SetOption, emit, errors, overrides, show_table
from raymill.errors import InputError, Problem
from raymill.files import make_private_folder
from raymill.paths import home
from raymill.redaction import for_people

app = typer.Typer(help="Get, check and look at data sets.", no_args_is_help=True)


@app.command("get")
def get(job: JobArgument, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Fetch the data set of a job, if it is not there yet."""
    with errors(json_):
        from raymill.config import load

        loaded = load.load_job(job, overrides(set_, None))
        pipeline = load.import_pipeline(loaded.spec)
        if pipeline.get is None:
            fix = "This job's data need no fetching, or you bring them."
            raise InputError([Problem(loaded.where("pipeline"), "a pipeline without `get`", "one that fetches data", fix)])
        # Before the pipeline makes folders below it.
        make_private_folder(home())
        folder = pipeline.get()
        emit({"folder": str(folder)}, json_, lambda console: console.print(for_people(folder), soft_wrap=True))


@app.command("check")
def check(job: JobArgument, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Read every row of a job's data once and report everything that is wrong."""
    with errors(json_):
        from raymill.config import load
        from raymill.data.manifest import take_manifest
        from raymill.data.quality import check_rows

        pipeline = load.import_pipeline(load.load_job(job, overrides(set_, None)).spec)
        result = check_rows(pipeline, take_manifest(pipeline))
        columns = ("split", "rows", "fragments", "bytes")
        rows = [(name, split["rows"], split["fragments"], split["bytes"]) for name, split in result.items()]
        emit(result, json_, lambda console: show_table(console, columns, rows))


@app.command("stats")
def stats(job: JobArgument, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Rows, bytes, and per column its range, quantiles, mean and class counts."""
    with errors(json_):
        from raymill.config import load
        from raymill.data.manifest import take_manifest
        from raymill.data.quality import statistics

        pipeline = load.import_pipeline(load.load_job(job, overrides(set_, None)).spec)
        taken = take_manifest(pipeline)
        found = {split: statistics(pipeline, taken, split) for split in taken.splits}
        emit(found, json_, lambda console: _show_statistics(console, found))


def _show_statistics(console: Console, found: dict[str, Any]) -> None:
    for name, split in found.items():
        console.print(for_people(f"{name}: {split['rows']} rows, {split['fragments']} fragments, {split['bytes']} bytes"))
        if split["bad_rows"]:
            console.print(for_people(f"{split['bad_rows']} bad rows, which are not measured"))
        columns = ("column", "dtype", "shape", "min", "5 %", "median", "95 %", "max", "mean", "not finite", "rows of each class")
        show_table(console, columns, [_column_row(column, about) for column, about in split["columns"].items()])
        console.print()


def _column_row(name: str, about: dict[str, Any]) -> tuple[object, ...]:
    """Of bytes and text, the numbers are those of their lengths."""
    length = about.get("length")
    measured = length or about
    quantiles = (measured["quantiles"] or {}).values() or (None, None, None)
    numbers = [measured["min"], *quantiles, measured["max"], measured["mean"]]
    dtype = f"length of {about['dtype']}" if length else about["dtype"]
    return (name, dtype, about["shape"], *numbers, about.get("num_not_finite"), about.get("class_counts"))
