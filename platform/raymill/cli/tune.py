"""The verbs about searches: tune JOB; tune list, show, export, stop."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from raymill.cli.output import (
    Aligned,
    JsonOption,
    SetOption,
    emit,
    errors,
    in_words,
    moment,
    plain_console,
    refuse_unless_one,
    show_table,
)
from raymill.redaction import for_people

StudyArgument = Annotated[str, typer.Argument(help="a study's name, as `raymill tune list` shows it")]


def tune(
    job: Annotated[
        str | None, typer.Argument(help="a job file, its folder, or a name in jobs/; or list, show, export, stop")
    ] = None,
    study: Annotated[str | None, typer.Argument(help="with show, export and stop: the study")] = None,
    set_: SetOption = None,
    trials: Annotated[int | None, typer.Option("--trials", help="same as --set search.trials=N; with --resume, in all")] = None,
    add_trials: Annotated[int, typer.Option("--add-trials", help="so many more than before", min=0)] = 0,
    resume: Annotated[str | None, typer.Option("--resume", help="go on with this study")] = None,
    new: Annotated[bool, typer.Option("--new", help="begin anew, whatever was begun before")] = False,
    parallel: Annotated[
        int | None, typer.Option("--parallel", help="no more trials at once, whatever the search says", min=1)
    ] = None,
    study_name: Annotated[str | None, typer.Option("--study-name", hidden=True, help="what a new study is called")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="with export: a .csv or .json file")] = None,
    json_: JsonOption = False,
) -> None:
    """Search over a job's fields; or list, show, export or stop searches. Killed or stopped, the same command goes on."""
    with errors(json_):
        verbs = {"list": _list, "show": _show, "export": _export, "stop": _stop}
        if job in verbs:
            verbs[job](study, out, json_)
            return
        if resume is None:
            refuse_unless_one("tune", job, resume)
        from raymill.tune.command import Asked, with_trials
        from raymill.tune.command import tune as search

        console = plain_console(stderr=True)
        asked = Asked(job or "", with_trials(set_ or [], trials), resume, new, add_trials, parallel, study_name)
        with _telling(console) as tell:
            summary = search(asked, tell, lambda text: console.print(for_people(text), soft_wrap=True))
        emit(summary, json_, lambda console: _show_summary(console, summary))


@contextmanager
def _telling(console: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What shows each trial that is over and, on a terminal, below them how the search stands, with the best five."""
    from raymill.tune.outcome import in_a_line, standing

    with Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else nullcontext() as live:

        def tell(trial: dict[str, Any]) -> None:
            console.print(for_people(in_a_line(trial)), soft_wrap=True)
            if live is not None:
                best = Aligned("best", "value", "values")
                for one in trial["so_far"]["top"]:
                    best.add_row(one["number"], one["value"], one["values"])
                live.update(Group(Text(""), Text(standing(trial["so_far"]), style="bold"), best), refresh=True)

        yield tell


def _show_summary(console: Console, summary: dict[str, Any]) -> None:
    from raymill.tracking.description import limits_in_words

    table = Aligned()
    table.add_row("study", summary["study"])
    table.add_row("trials", summary["trials"])
    objectives = {summary["metric"]: summary["mode"], **summary["also"]}
    table.add_row("searched for", ", ".join(f"{mode} {metric}" for metric, mode in objectives.items()))
    if summary["limits"]:
        table.add_row("inside", f"{', '.join(limits_in_words(summary['limits']))}; {summary['outside']} trials were not")
    if summary["job_as_it_stands"] is not None:
        table.add_row("the job as it stands", summary["job_as_it_stands"])
    if not summary["best"]:
        table.add_row("best", "no trial ran to its end inside the limits" if summary["limits"] else "no trial ran to its end")
    if best := summary["best"]:
        deviation = f" (deviation {in_words(best['deviation'])})" if best["deviation"] is not None else ""
        table.add_row("best", f"{in_words(best['value'])}{deviation}, trial {best['number']}")
        table.add_row("its values", best["values"])
        table.add_row("its run", best["runs"])
    if model := summary.get("model"):
        table.add_row("model", f"{model['name']} version {model['version']}, alias {model['alias']}")
    console.print(table, soft_wrap=True)
    if shown := summary["front"] or summary["top"]:
        beside = [*summary["also"], *(name for name in summary["limits"] if name not in objectives)]
        console.print("\nthe trials that no other beats in every metric" if summary["front"] else "")
        show_table(
            console,
            ("trial", "value", *beside, "seconds", "values"),
            [[t["number"], t["value"], *(t["metrics"][name] for name in beside), t["seconds"], t["values"]] for t in shown],
        )
    if summary.get("note"):
        console.print(f"\n{for_people(summary['note'])}", soft_wrap=True)
    console.print("\nNext:")
    if summary["best"]:
        sets = " ".join(f"--set {name}={json.dumps(value)}" for name, value in summary["best"]["values"].items())
        console.print(for_people(f"  raymill train {summary['job']} {sets}"), soft_wrap=True)
    console.print(f"  raymill tune show {summary['study']}\n  raymill ui")


def _list(study: str | None, out: Path | None, json_: bool) -> None:
    from raymill.tune.folder import all_studies
    from raymill.tune.outcome import show

    found = [show(folder) for folder in all_studies()]
    columns = ("study", "begun", "trials", "metric", "best")
    bests = [one["best"]["value"] if one["best"] else None for one in found]
    rows = [
        [one["study"], moment(one["begun_s"]), one["trials"], one["metric"], best] for one, best in zip(found, bests, strict=True)
    ]
    emit({"studies": found}, json_, lambda console: show_table(console, columns, rows))


def _show(study: str | None, out: Path | None, json_: bool) -> None:
    from raymill.files import read_record
    from raymill.tune.folder import find_study
    from raymill.tune.outcome import show

    folder = find_study(study or "")
    summary = show(folder) | (read_record(folder.delivered) if folder.delivered.exists() else {})
    emit(summary, json_, lambda console: _show_summary(console, summary))


def _export(study: str | None, out: Path | None, json_: bool) -> None:
    from raymill.tune.folder import find_study
    from raymill.tune.outcome import table

    columns, rows = table(find_study(study or ""))
    if out is not None and out.suffix == ".json":
        out.write_text(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1))
    elif not json_ or out is not None:
        with out.open("w", newline="") if out is not None else _stdout() as file:
            writer = csv.writer(file)
            writer.writerows([columns, *rows])
    if json_:
        emit({"columns": columns, "rows": rows}, json_, lambda console: None)


def _stdout() -> Any:
    from contextlib import nullcontext

    return nullcontext(sys.stdout)


def _stop(study: str | None, out: Path | None, json_: bool) -> None:
    from raymill.tune.folder import find_study

    folder = find_study(study or "")
    folder.stop_request.touch()
    emit(
        {"study": folder.name, "stopping": True},
        json_,
        lambda console: console.print(f"{folder.name}: its trials are asked to stop"),
    )
