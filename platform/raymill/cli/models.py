"""The verbs about trained models: models, evaluate, predict; and ui, the page where they are looked at."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any, Literal

import typer

from raymill.cli.output import JsonOption, ModelArgument, emit, errors, moment, plain_console, show_table, show_values
from raymill.redaction import for_people
from raymill.task import VALIDATION

app = typer.Typer(help="Browse registered models.", no_args_is_help=True)


@app.command("list")
def list_models(json_: JsonOption = False) -> None:
    """List registered models, their versions and aliases."""
    with errors(json_):
        from raymill.models import registry

        found = registry.list_models()
        columns = ("model", "newest version", "aliases", "updated")
        rows = [(one["name"], next(iter(one["versions"]), None), one["aliases"], moment(one["updated_s"])) for one in found]
        emit({"models": found}, json_, lambda console: show_table(console, columns, rows))


@app.command("show")
def show_model(model: ModelArgument, json_: JsonOption = False) -> None:
    """Show one model version."""
    with errors(json_):
        from raymill.models import registry

        found = registry.show_model(model)
        values = {
            "model": f"{found['name']}/{found['version']}",
            "aliases": found["aliases"],
            "made": moment(found["created_s"]),
            "run": found["run_id"],
            **found["metrics"],
            "takes": found["takes"],
            "gives": found["gives"],
            "exported": found["exported"] or f"no: {found['not_exported']}",
            "weights SHA-256": found["weights_sha256"],
            "data SHA-256": found["data_digest"],
            "code SHA-256": found["code_digest"],
            "its code": found["code"],
        }
        emit(found, json_, lambda console: show_values(console, values))


ExportOption = Annotated[
    Literal["required", "try", "never"] | None, typer.Option("--export", help="in place of the job's `register.export`")
]


@app.command("register")
def register_model(
    run: Annotated[str, typer.Argument(help="the id of a finished run whose job says `register:`")],
    export: ExportOption = None,
    json_: JsonOption = False,
) -> None:
    """Register the model of a finished run again, such as one that could not be exported."""
    with errors(json_):
        from raymill.models.registration import register_run

        made = register_run(run, export)
        values = {"model": f"{made['name']}/{made['version']}", "alias": made["alias"], "not exported": made.get("not_exported")}
        emit(made, json_, lambda console: show_values(console, values))


SplitOption = Annotated[str, typer.Option("--split", help="the split of the job's pipeline whose rows are measured")]


def evaluate(model: ModelArgument, split: SplitOption = VALIDATION, json_: JsonOption = False) -> None:
    """Measure a model on a split of its job's rows, every row exactly once."""
    with errors(json_):
        from raymill.models.evaluate import evaluate as evaluate_model

        result = evaluate_model(model, split)
        for line in _about_code(result["code_changed"]):
            plain_console(stderr=True).print(for_people(line), soft_wrap=True)
        values = {"model": model, **result["metrics"], "rows": result["rows"]}
        emit(result, json_, lambda console: show_values(console, values))


RowsOption = Annotated[str, typer.Option("--rows", help="a .parquet or .jsonl file; - for lines of JSON from stdin")]
OutOption = Annotated[str, typer.Option("--out", help="a .parquet or .jsonl file; - for lines of JSON to stdout")]
BatchRowsOption = Annotated[int | None, typer.Option("--batch-rows", min=1, help="rows that are asked about at once")]


def predict(
    model: ModelArgument, rows: RowsOption, out: OutOption = "-", batch_rows: BatchRowsOption = None, json_: JsonOption = False
) -> None:
    """Ask a model about rows as its job's sources give them, without labels; one answer per row, in their order."""
    with errors(json_):
        from raymill.models import tables
        from raymill.models.predict import Predictor

        # What the job's own code prints is no answer.
        stdout = sys.stdout
        with redirect_stdout(sys.stderr):
            predictor = Predictor.load(model)
            changed = predictor.trained.code_changes()
            for line in _about_code(None if changed is None else [change.model_dump() for change in changed]):
                plain_console(stderr=True).print(for_people(line), soft_wrap=True)
            questions = tables.read(rows, predictor.takes, predictor.may_lack, batch_rows or predictor.batch_rows)
            answers = predictor.predict_each(questions)
            result: dict[str, Any] = {"model": predictor.trained.name}
            if json_ and out == "-":
                # One object holds all of them; so they have to be few.
                result["predictions"] = [answer for batch in answers for answer in tables.as_json(batch)]
                result["rows"] = len(result["predictions"])
            else:
                result |= {"rows": tables.write(out, answers, stdout), "out": out}
        if json_:
            # Not redacted: a column may well be called "tokens".
            print(json.dumps(result))
        elif out != "-":
            show_values(plain_console(), result)


def _about_code(changed: list[dict[str, Any]] | None) -> list[str]:
    from raymill.record.kept_code import FileChange

    if changed is None:
        return ["note: the code that trained this model is not known; today's was used"]
    if not changed:
        return []
    what = [f"  {FileChange.model_validate(change)}" for change in changed]
    return ["note: this model was trained with other code than today's, which was used; how today's differs:", *what]


def ui(port: Annotated[int, typer.Option(help="port on 127.0.0.1")] = 5000) -> None:
    """Open the MLflow page of this project on this machine, until Ctrl-C; or say where it is, if a cluster has opened it."""
    with errors(False):
        from raymill.cluster import mlflow_server
        from raymill.tracking.ui import experiments, serve_ui

        def show(page: str, experiments: dict[str, str]) -> None:
            lines = [f"MLflow: {page}", *(f"  {job}: {address}" for job, address in experiments.items())]
            plain_console(stderr=True).print("\n".join(lines), soft_wrap=True)

        servers = mlflow_server.running()
        for server in servers:
            who = f"user {server['user']}, password in {server['password_file']}"
            show(f"{server['address']}  (of the cluster {server['cluster']}; {who})", experiments(server["address"]))
        if not servers:
            serve_ui(port, lambda page, links: show(f"{page}  (Ctrl-C ends it)", links))
