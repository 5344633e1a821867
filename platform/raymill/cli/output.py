"""What the verbs share: their options, and how a result or an error is printed.

`--json` puts one JSON object on stdout and nothing else there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from raymill.errors import InputError, Problem, RaymillError
from raymill.own_code.traces import culprit, own_frames, tell
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
    """Turn errors into a message (or a JSON object) and an exit code."""
    try:
        yield
    except RaymillError as error:
        problems = [problem.as_dict() for problem in error.problems] if isinstance(error, InputError) else []
        _fail(error, problems, as_json, error.exit_code)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        _fail(error, [], as_json, 1)


def _fail(error: Exception, problems: list[dict[str, str]], as_json: bool, exit_code: int) -> None:
    """Say what failed, and its notes: a run's own say what to do next.

    An error of the job's own code is told from its own lines; any other that nobody foresaw keeps its whole traceback.
    """
    notes = getattr(error, "__notes__", [])
    foreseen = isinstance(error, RaymillError)
    own = not foreseen and bool(own_frames(culprit(error)))
    told = tell(error) if own else "\n".join([f"{type(error).__name__}: {error}", *notes])
    if as_json:
        message = told.removeprefix(f"{type(error).__name__}: ") if own else str(error)
        found = {"error": type(error).__name__, "message": message, "problems": problems, "notes": notes}
        print(json.dumps(redact(found), indent=1))
    if foreseen or own:
        plain_console(stderr=True).print(for_people(told), soft_wrap=True)
    else:
        print_redacted(type(error), error, error.__traceback__)
    raise typer.Exit(exit_code) from error


def overrides(given: list[str] | None, workers: int | None) -> list[str]:
    """All overrides of a command line."""
    return [*(given or []), *([f"scale.workers={workers}"] if workers is not None else [])]


# ---------------------------------------------------------------- tables for people


class Aligned:
    """A table whose lines are as long as they have to be: ids and hashes stay whole, however narrow the terminal or pipe is.

    To be printed with `soft_wrap=True`.
    """

    def __init__(self, *header: str) -> None:
        """With these names of columns, or none."""
        self._header = header
        self._rows: list[list[str]] = []

    def add_row(self, *cells: object) -> None:
        """Add a row; see `in_words`."""
        # A line is a row: what has more of its own is put on one.
        self._rows.append([" ".join(for_people(in_words(cell)).split("\n")) for cell in cells])

    def __rich_console__(self, console: Console, options: object) -> Iterator[Text]:
        """Its lines, the columns aligned."""
        rows = [list(self._header), *self._rows] if self._header else self._rows
        widths = [max(map(cell_len, column)) for column in zip_longest(*rows, fillvalue="")]
        for row in rows:
            cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=False))
            yield Text("  ".join(cells).rstrip(), style="bold" if self._header and row is rows[0] else "")


def in_words(value: object) -> str:
    """A value as people read it: short numbers, `name value` for a metric, "-" for what there is none of."""
    if value is None or value == [] or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {in_words(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    return str(value)


def moment(time_s: float | None) -> str | None:
    """Unix seconds as date and time of day where the reader is."""
    return None if time_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def duration(seconds: float | None) -> str | None:
    """Seconds as people say them, in two units at most: "12.3 s", "3 min 20 s", "2 h 05 min"."""
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest_s = divmod(round(seconds), 60)
    return f"{minutes} min {rest_s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def refuse_unless_one(verb: str, job: str | None, resume: str | None) -> None:
    """Raise InputError unless a verb was given either a job or a run to go on with."""
    if (job is None) == (resume is None):
        fix = "Give a job file, or --resume RUN."
        raise InputError([Problem(verb, "both or neither of JOB and --resume", "one of them", fix)])


def show_values(console: Console, values: Mapping[str, object]) -> None:
    """Print names and values below each other."""
    table = Aligned()
    for name, value in values.items():
        table.add_row(name, value)
    console.print(table, soft_wrap=True)


def show_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows below the names of their columns."""
    table = Aligned(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=True)
