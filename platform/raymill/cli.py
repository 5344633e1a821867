"""The verbs: parse, call one function, print, exit code. `--json` puts one JSON object on stdout and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from raymill.errors import InputError, Problem, RaymillError

app = typer.Typer(
    help="Distributed PyTorch training on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
runs_app = typer.Typer(help="Browse runs.", no_args_is_help=True)
models_app = typer.Typer(help="Browse registered models.", no_args_is_help=True)
data_app = typer.Typer(help="Get, check and look at data sets.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")

JobArgument = Annotated[str, typer.Argument(help="a job file, its folder, or the name of a folder in jobs/")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="override a field: --set loop.epochs=1")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else there")]
WorkersOption = Annotated[int | None, typer.Option("--workers", help="worker processes; same as --set scale.workers=N")]


def main() -> None:
    """Run the command line; exits with 0 done, 1 failed, 2 the user's input is wrong, 3 interrupted and resumable."""
    app()


# ---------------------------------------------------------------- output


def _emit(result: dict[str, Any], as_json: bool, show: Callable[[Console], None]) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        show(Console())


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Turn our errors into a message (or a JSON object) and an exit code."""
    try:
        yield
    except RaymillError as error:
        problems = [problem.as_dict() for problem in error.problems] if isinstance(error, InputError) else []
        if as_json:
            print(json.dumps({"error": type(error).__name__, "message": str(error), "problems": problems}, indent=1))
        Console(stderr=True).print(f"{type(error).__name__}: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error


def _overrides(given: list[str] | None, workers: int | None) -> list[str]:
    return [*(given or []), *([f"scale.workers={workers}"] if workers is not None else [])]


# ---------------------------------------------------------------- jobs


@app.command()
def check(job: JobArgument, set_: SetOption = None, workers: WorkersOption = None, json_: JsonOption = False) -> None:
    """Validate a job and its data without starting anything."""
    with _errors(json_):
        from raymill import load, run

        loaded = load.examine_job(job, _overrides(set_, workers))
        prepared = run.prepare(loaded)
        rows = {split: part.num_rows for split, part in prepared.manifest.splits.items()}
        _emit(
            {"job": prepared.spec.name, "valid": True, "rows": rows, "problems": []},
            json_,
            lambda console: console.print(f"{loaded.path}: valid; rows: {rows}", highlight=False),
        )


@app.command()
def plan(job: JobArgument, set_: SetOption = None, workers: WorkersOption = None, json_: JsonOption = False) -> None:
    """Print every derived number of a job with its reason."""
    with _errors(json_):
        from raymill import load, run
        from raymill.plan import explain

        prepared = run.prepare(load.examine_job(job, _overrides(set_, workers)))

        def show(console: Console) -> None:
            table = Table("number", "value", "reason", box=None, header_style="bold")
            for row in explain(prepared.plan):
                table.add_row(*row)
            console.print(table)

        _emit(prepared.plan.as_record(), json_, show)


@app.command()
def train(
    job: Annotated[str | None, typer.Argument(help="a job file, its folder, or a name in jobs/; not with --resume")] = None,
    set_: SetOption = None,
    workers: WorkersOption = None,
    resume: Annotated[str | None, typer.Option("--resume", help="id of an interrupted or failed run")] = None,
    json_: JsonOption = False,
) -> None:
    """Run a job: train, track, register."""
    with _errors(json_):
        from raymill import load, run
        from raymill.home import RunFolder
        from raymill.progress import Progress

        if (job is None) == (resume is None):
            fix = "Give a job file, or --resume RUN."
            raise InputError([Problem("train", "both or neither of JOB and --resume", "one of them", fix)])
        if resume is not None and set_:
            fix = "Resume it as it was, or start a new run."
            raise InputError([Problem("--set", "--resume with changed values", "the values of the run", fix)])
        prepared = run.prepare(load.examine_job(job, _overrides(set_, workers))) if job else None
        with ExitStack() as stack:

            def watch(folder: RunFolder) -> Callable[[dict[str, Any]], None]:
                console = Console(stderr=True)
                console.print(f"run {folder.run_id}", highlight=False)
                console.print(f"Ray's output: {folder.ray_log}", highlight=False, soft_wrap=True)
                return stack.enter_context(Progress(console)).show

            summary = run.train(prepared, watch) if prepared else run.resume(str(resume), workers, watch)
        _emit(summary, json_, lambda console: _show_summary(console, summary))


def _show_summary(console: Console, summary: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name in ("run_id", "status", "steps", "best_step", "weights_sha256", "rows_per_s", "seconds_to_first_step"):
        table.add_row(name, str(summary[name]))
    for name, value in summary["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    table.add_row("rows", ", ".join(f"{name} {count}" for name, count in summary["rows"].items()))
    if summary["degraded"]:
        table.add_row("bad rows", f"{summary['bad_rows']['distinct']} left out ({summary['bad_rows']['policy']})")
    table.add_row("waiting for data", f"{summary['data_wait_share']:.1%} of the time")
    model = summary.get("model")
    if model:
        table.add_row("model", f"{model['name']} version {model['version']}, alias {model['alias']}")
    console.print(table)
    console.print("\nNext:", highlight=False)
    if model:
        console.print(f"  raymill evaluate {model['name']}@{model['alias']}", highlight=False)
    console.print(f"  raymill runs show {summary['run_id']}\n  raymill ui", highlight=False)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="name@alias, name/version, or a run id")], json_: JsonOption = False
) -> None:
    """Measure a model on its job's validation rows, every row exactly once."""
    with _errors(json_):
        from raymill.evaluation import evaluate as measure

        result = measure(model)
        _emit(
            result,
            json_,
            lambda console: _show_values(console, {"model": model, **result["metrics"], "rows": result["rows"]}),
        )


@app.command()
def jobs(json_: JsonOption = False) -> None:
    """List the jobs of this project."""
    with _errors(json_):
        from raymill.load import list_jobs

        found = list_jobs()
        columns = ("name", "path", "about", "valid")
        _emit({"jobs": found}, json_, lambda console: _show_table(console, found, columns))


@app.command()
def ui(port: Annotated[int, typer.Option(help="port on 127.0.0.1")] = 5000) -> None:
    """Open the MLflow page of this project on this machine, until Ctrl-C."""
    with _errors(False):
        from raymill.ui import serve_ui

        Console(stderr=True).print(f"MLflow: http://127.0.0.1:{port}  (Ctrl-C ends it)", highlight=False)
        serve_ui(port)


# ---------------------------------------------------------------- runs, models, data


@runs_app.command("list")
def runs_list(json_: JsonOption = False) -> None:
    """List the runs of this project, newest first."""
    with _errors(json_):
        from raymill.tracking import list_runs

        found = list_runs()
        _emit({"runs": found}, json_, lambda console: _show_table(console, found, ("run_id", "status", "step", "metrics")))


@runs_app.command("show")
def runs_show(run: Annotated[str, typer.Argument(help="run id")], json_: JsonOption = False) -> None:
    """Show one run."""
    with _errors(json_):
        from raymill.tracking import show_run

        found = show_run(run)
        _emit(found, json_, lambda console: _show_values(console, found))


@models_app.command("list")
def models_list(json_: JsonOption = False) -> None:
    """List registered models, their versions and aliases."""
    with _errors(json_):
        from raymill.registry import list_models

        found = list_models()
        _emit({"models": found}, json_, lambda console: _show_table(console, found, tuple(found[0]) if found else ()))


@models_app.command("show")
def models_show(
    model: Annotated[str, typer.Argument(help="name@alias, name/version, or a run id")], json_: JsonOption = False
) -> None:
    """Show one model version."""
    with _errors(json_):
        from raymill.registry import show_model

        found = show_model(model)
        _emit(found, json_, lambda console: _show_values(console, found))


@data_app.command("get")
def data_get(job: JobArgument, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Fetch the data set of a job, if it is not there yet."""
    with _errors(json_):
        from raymill import load

        loaded = load.load_job(job, _overrides(set_, None))
        pipeline = load.import_pipeline(loaded.spec)
        if pipeline.get is None:
            fix = "This job's data need no fetching, or you bring them."
            raise InputError([Problem(loaded.where("pipeline"), "a pipeline without `get`", "one that fetches data", fix)])
        folder = pipeline.get()
        _emit({"folder": str(folder)}, json_, lambda console: console.print(str(folder), highlight=False, soft_wrap=True))


@data_app.command("check")
def data_check(job: JobArgument, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Read every row of a job's data once and report everything that is wrong."""
    with _errors(json_):
        from raymill import load
        from raymill.manifest import check_rows, take_manifest

        pipeline = load.import_pipeline(load.load_job(job, _overrides(set_, None)).spec)
        result = check_rows(pipeline, take_manifest(pipeline))
        _emit(result, json_, lambda console: _show_values(console, result))


@data_app.command("stats")
def data_stats(job: JobArgument, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Rows, bytes, and per column its range, mean and class counts."""
    with _errors(json_):
        from raymill import load
        from raymill.manifest import statistics, take_manifest

        pipeline = load.import_pipeline(load.load_job(job, _overrides(set_, None)).spec)
        taken = take_manifest(pipeline)
        found = {split: statistics(pipeline, taken, split) for split in taken.splits}
        _emit(found, json_, lambda console: _show_values(console, found))


def _show_values(console: Console, values: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False)
    for name, value in values.items():
        if isinstance(value, dict):
            value = json.dumps(value, indent=1)
        table.add_row(str(name), f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


def _show_table(console: Console, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(_short(row.get(column, "")) for column in columns))
    console.print(table)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(
            f"{name} {number:.4g}" if isinstance(number, float) else f"{name} {number}" for name, number in value.items()
        )
    return str(value)
