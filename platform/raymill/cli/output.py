"""What the verbs share: their options, and how a result or an error is printed.

`--json` puts one JSON object on stdout and nothing else there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from raymill.errors import InputError, RaymillError
from raymill.redaction import for_people, print_redacted, redact

JobArgument = Annotated[str, typer.Argument(help="a job file, its folder, or the name of a folder in jobs/")]
ModelArgument = Annotated[str, typer.Argument(help="name@alias, name/version, or a run id")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="override a field: --set loop.epochs=1")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else there")]
WorkersOption = Annotated[int | None, typer.Option("--workers", help="worker processes; same as --set scale.workers=N")]
InProcessOption = Annotated[bool, typer.Option("--in-process", help="one worker in this process, without Ray")]


def emit(result: dict[str, Any], as_json: bool, show: Callable[[Console], None]) -> None:
    """Print a result as JSON, or as people read it."""
    if as_json:
        print(json.dumps(redact(result), indent=1))
    else:
        show(plain_console())


def plain_console(*, stderr: bool = False) -> Console:
    """Where people read. What is printed often comes from files and events, so no text is taken for markup or highlighted."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Turn errors into a message (or a JSON object) and an exit code; an error of the job's own code keeps its traceback."""
    try:
        yield
    except RaymillError as error:
        problems = [problem.as_dict() for problem in error.problems] if isinstance(error, InputError) else []
        _fail(error, problems, as_json, error.exit_code)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        print_redacted(type(error), error, error.__traceback__)
        _fail(error, [], as_json, 1)


def _fail(error: Exception, problems: list[dict[str, str]], as_json: bool, exit_code: int) -> None:
    if as_json:
        print(json.dumps(redact({"error": type(error).__name__, "message": str(error), "problems": problems}), indent=1))
    plain_console(stderr=True).print(for_people(f"{type(error).__name__}: {error}"), soft_wrap=True)
    raise typer.Exit(exit_code) from error


def overrides(given: list[str] | None, workers: int | None) -> list[str]:
    """All overrides of a command line."""
    return [*(given or []), *([f"scale.workers={workers}"] if workers is not None else [])]


def show_values(console: Console, values: dict[str, Any]) -> None:
    """Print names and values below each other."""
    table = Table(box=None, show_header=False)
    for name, value in values.items():
        if isinstance(value, dict):
            value = json.dumps(value, indent=1)
        table.add_row(for_people(name), f"{value:.4f}" if isinstance(value, float) else for_people(value))
    console.print(table)


def show_table(console: Console, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Print rows as a table."""
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(for_people(_short(row.get(column, ""))) for column in columns))
    console.print(table)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(
            f"{name} {number:.4g}" if isinstance(number, float) else f"{name} {number}" for name, number in value.items()
        )
    return str(value)
