"""The verbs about data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from raymill.cli.output import JobArgument, JsonOption, SetOption, emit, errors, overrides, plain_console, show_table
from raymill.errors import InputError, Problem, did_you_mean
from raymill.files import make_private_folder
from raymill.paths import home
from raymill.redaction import for_people

if TYPE_CHECKING:
    from raymill.data.manifest import Manifest
    from raymill.task import Pipeline

ROWS_OF_A_PAGE = 12

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
        licence = loaded.spec.card.licence if loaded.spec.card else ""

        def show(console: Console) -> None:
            console.print(for_people(folder), soft_wrap=True)
            if licence:
                console.print(for_people(f"licence: {licence}"), soft_wrap=True)

        emit({"folder": str(folder), "licence": licence}, json_, show)


def _data(job: str, set_: list[str] | None) -> tuple[Pipeline, Manifest, bool]:
    """A job's pipeline, what it holds, and whether bad rows are to be left out."""
    from raymill.config import load
    from raymill.data.manifest import take_manifest

    spec = load.load_job(job, overrides(set_, None)).spec
    pipeline = load.import_pipeline(spec)
    return pipeline, take_manifest(pipeline, lenient=spec.bad_rows.lenient), spec.bad_rows.lenient


@app.command("check")
def check(job: JobArgument, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Read every row of a job's data once and report everything that is wrong."""
    with errors(json_):
        from raymill.data.quality.check import check_rows

        pipeline, taken, _ = _data(job, set_)
        with _progress(taken) as progress:
            result = check_rows(pipeline, taken, progress)
        columns = ("split", "rows", "fragments", "bytes", "classes without rows")
        rows = [
            (name, split["rows"], split["fragments"], split["bytes"], _in_words(split.get("classes_without_rows")))
            for name, split in result.items()
        ]
        emit(result, json_, lambda console: show_table(console, columns, rows))


@app.command("stats")
def stats(
    job: JobArgument,
    set_: SetOption = None,
    html: Annotated[Path | None, typer.Option("--html", help="write a page with bars and some rows, pictures as such")] = None,
    json_: JsonOption = False,
) -> None:
    """Rows, bytes, per column its range, quantiles, mean and class counts; and rows that come twice, in a split or in two."""
    with errors(json_):
        from raymill.data.quality.look import shown
        from raymill.data.quality.page import page
        from raymill.data.quality.repeated import repeated_rows
        from raymill.data.quality.statistics import statistics

        pipeline, taken, _ = _data(job, set_)
        with _progress(taken, passes=2) as progress:
            found = {split: statistics(pipeline, taken, split, progress) for split in taken.splits}
            repeated = repeated_rows(pipeline, taken, progress)
        if html is not None:
            first = {split: shown(pipeline, taken, split, ROWS_OF_A_PAGE, lenient=True) for split in taken.splits}
            html.write_text(page(f"The data of {job}", found, repeated, first), encoding="utf-8")

        def show(console: Console) -> None:
            _show_statistics(console, found)
            _show_repeated(console, repeated)
            if html is not None:
                console.print(for_people(f"page: {html}"), soft_wrap=True)

        emit({"splits": found, "repeated": repeated}, json_, show)


@app.command("show")
def show(
    job: JobArgument,
    set_: SetOption = None,
    split: Annotated[str, typer.Option("--split", help="of the pipeline")] = "train",
    rows: Annotated[int, typer.Option("--rows", min=1, max=1000, help="how many")] = 5,
    json_: JsonOption = False,
) -> None:
    """Print the first rows of a split, as they are before the transform."""
    with errors(json_):
        from raymill.data.quality.look import in_words, shown

        pipeline, taken, lenient = _data(job, set_)
        if split not in taken.splits:
            fix = did_you_mean(split, taken.splits)
            raise InputError([Problem("--split", repr(split), "a split of the pipeline", fix)])
        found = shown(pipeline, taken, split, rows, lenient=lenient)
        words = [dict(zip(found, map(in_words, row), strict=True)) for row in zip(*found.values(), strict=True)]
        rows_shown = [tuple(row.values()) for row in words]
        emit({"split": split, "rows": words}, json_, lambda console: show_table(console, tuple(found), rows_shown))


@app.command("prepare")
def prepare(
    job: JobArgument,
    to: Annotated[Path, typer.Option("--to", help="the folder to write; one that was begun is gone on with")],
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Write a job's data again as Parquet files of good size, each read back; what was killed is gone on with."""
    with errors(json_):
        from raymill.data.sources import prepare as preparing

        pipeline, taken, lenient = _data(job, set_)
        with _progress(taken) as progress:
            made = preparing.prepare(pipeline, taken, to, lenient=lenient, progress=progress)
        columns = ("split", "files", "rows", "bytes", "bad rows")
        rows = [(name, one["files"], one["rows"], one["bytes"], one["bad_rows"]) for name, one in made.items()]
        emit(made, json_, lambda console: show_table(console, columns, rows))


@contextmanager
def _progress(taken: Manifest, passes: int = 1) -> Iterator[Callable[[str, int], None]]:
    """A bar for each split, on stderr: is told of rows that were read, each of them so often."""
    from rich.progress import Progress

    with Progress(console=plain_console(stderr=True)) as bar:
        tasks = {name: bar.add_task(name, total=part.num_rows * passes) for name, part in taken.splits.items()}
        yield lambda name, done: bar.advance(tasks[name], done)


def _in_words(classes: dict[str, list[int]] | None) -> str | None:
    return "; ".join(f"{column}: {', '.join(map(str, missing))}" for column, missing in classes.items()) if classes else None


def _show_statistics(console: Console, found: dict[str, Any]) -> None:
    for name, split in found.items():
        console.print(for_people(f"{name}: {split['rows']} rows, {split['fragments']} fragments, {split['bytes']} bytes"))
        if split["bad_rows"]:
            console.print(for_people(f"{split['bad_rows']} bad rows, which are not measured"))
        columns = ("column", "dtype", "shape", "min", "5 %", "median", "95 %", "max", "mean", "not finite", "rows of each class")
        show_table(console, columns, [_column_row(column, about) for column, about in split["columns"].items()])
        console.print()


def _show_repeated(console: Console, found: dict[str, Any]) -> None:
    rows = [(f"{split}: rows that are there already", count) for split, count in found["within"].items()]
    rows += [("{1}: rows that are in {0} too".format(*pair.split(", ")), count) for pair, count in found["across"].items()]
    of = f", one row in {found['one_in']}" if found["one_in"] > 1 else ""
    show_table(console, (f"alike in {', '.join(found['columns'])}{of}", "rows"), rows)


def _column_row(name: str, about: dict[str, Any]) -> tuple[object, ...]:
    """Of bytes and text, the numbers are those of their lengths."""
    length = about.get("length")
    measured = length or about
    quantiles = (measured["quantiles"] or {}).values() or (None, None, None)
    numbers = [measured["min"], *quantiles, measured["max"], measured["mean"]]
    dtype = f"length of {about['dtype']}" if length else about["dtype"]
    return (name, dtype, about["shape"], *numbers, about.get("num_not_finite"), about.get("class_counts"))
