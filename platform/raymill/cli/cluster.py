"""The verbs about clusters, and about runs that were submitted to one."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from raymill.cli.output import (
    JsonOption,
    SetOption,
    WorkersOption,
    emit,
    errors,
    moment,
    overrides,
    refuse_unless_one,
    show_table,
    show_values,
)
from raymill.redaction import for_people

app = typer.Typer(help="Start, look at and end Ray clusters.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="of a file in cluster/, without .yaml")]
ClusterOption = Annotated[str, typer.Option("--cluster", help="name of a file in cluster/, without .yaml")]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="also a cluster that runs code for whoever reaches it")]
RunArgument = Annotated[str, typer.Argument(help="run id")]


@app.command("up")
def up(name: NameArgument = "local", json_: JsonOption = False) -> None:
    """Start a cluster of several nodes on this machine, on loopback, with a token; and MLflow, where its file says so."""
    with errors(json_):
        from raymill.cluster import local, spec

        _show_status(local.up(name, _local(spec.load_cluster(name), name)), json_)


@app.command("status")
def status(name: NameArgument = "local", json_: JsonOption = False) -> None:
    """Say what of a cluster runs."""
    with errors(json_):
        from raymill.cluster import local, spec

        _local(spec.load_cluster(name), name)
        _show_status(local.status(name), json_)


@app.command("down")
def down(name: NameArgument = "local", json_: JsonOption = False) -> None:
    """End a cluster of this machine; runs that go on there are lost processes, to be resumed."""
    with errors(json_):
        from raymill.cluster import local, spec

        _local(spec.load_cluster(name), name)
        told = local.down(name)
        ended = f"{told['ended']} nodes{' and the MLflow server' if told['mlflow_ended'] else ''}"
        emit(told, json_, lambda console: console.print(for_people(f"{name}: {ended} ended")))


@app.command("check")
def check(name: NameArgument = "local", insecure: InsecureOption = False, json_: JsonOption = False) -> None:
    """Look at every node: versions, clocks, disks, memory, GPUs, the way between them. Ends with 1 where something does harm."""
    with errors(json_):
        from raymill.cluster import spec, submitted

        told = submitted.check(name, spec.load_cluster(name, insecure=insecure))

        def show(console: Console) -> None:
            columns = ("node", "disk free", "shared memory free", "GPUs", "clock", "to it from the one before")
            rows = [
                (
                    one["name"],
                    f"{one['disk_free_gb']:g} GB",
                    f"{one['shared_memory_free_gb']:g} GB",
                    len(one["gpus"]),
                    f"{one['skew_s']:+.3f} s",
                    f"{one['bandwidth_mb_s'] or 0:.0f} MB/s",
                )
                for one in told["nodes"]
                if not one.get("failed")
            ]
            show_table(console, columns, rows)
            for line in told["differences"] or ["nothing differs"]:
                console.print(for_people(line), soft_wrap=True)

        emit(told, json_, show)
        if told["differences"]:
            raise typer.Exit(1)


def submit(
    job: Annotated[str | None, typer.Argument(help="a job file, its folder, or a name in jobs/; not with --resume")] = None,
    cluster: ClusterOption = "local",
    set_: SetOption = None,
    workers: WorkersOption = None,
    resume: Annotated[str | None, typer.Option("--resume", help="id of an interrupted or failed run, or a study")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="search over the job's fields, as `raymill tune` does")] = False,
    priority: Annotated[int, typer.Option("--priority", help="higher ones go first; lower ones make room for them")] = 0,
    follow: Annotated[bool, typer.Option("--follow", help="print what it prints, until it ends")] = False,
    insecure: InsecureOption = False,
    json_: JsonOption = False,
) -> None:
    """Hand a run, or a search, to a cluster; it goes on there when this terminal is closed."""
    with errors(json_):
        from raymill.cluster import spec, submitted

        refuse_unless_one("submit", job, resume)
        read = spec.load_cluster(cluster, insecure=insecure)
        told = submitted.submit(cluster, read, job or "", overrides(set_, workers), resume, priority, search=tune)
        again = f"raymill logs {told['run_id']} --cluster {cluster} --follow"
        emit(told, json_, lambda console: console.print(for_people(f"{told['run_id']}\n\nNext:\n  {again}"), soft_wrap=True))
        if follow:
            _end(submitted.logs(cluster, read, told["run_id"], _write, follow=True))


def ps(cluster: ClusterOption = "local", insecure: InsecureOption = False, json_: JsonOption = False) -> None:
    """List what was submitted to a cluster: those that wait in line first, then all others, newest first."""
    with errors(json_):
        from raymill.cluster import spec, submitted

        found = submitted.list_submitted(cluster, spec.load_cluster(cluster, insecure=insecure))
        columns = ("run", "status", "place", "priority", "workers", "attempts", "job", "by", "submitted", "ended")
        names = ("run_id", "status", "place", "priority", "workers", "attempts", "job", "user")
        rows = [(*(one[name] for name in names), _when(one["submitted_ms"]), _when(one["ended_ms"])) for one in found]
        emit({"submitted": found}, json_, lambda console: show_table(console, columns, rows))


def logs(
    run: RunArgument,
    cluster: ClusterOption = "local",
    follow: Annotated[bool, typer.Option("--follow", help="go on until the run ends, and end as it does")] = False,
    insecure: InsecureOption = False,
) -> None:
    """Print what a submitted run has printed."""
    with errors(False):
        from raymill.cluster import spec, submitted

        told = submitted.logs(cluster, spec.load_cluster(cluster, insecure=insecure), run, _write, follow=follow)
        if follow:
            _end(told)


def attach(run: RunArgument, cluster: ClusterOption = "local", insecure: InsecureOption = False) -> None:
    """Show a submitted run as if it had been started here, and end as it does; the same as `logs --follow`."""
    logs(run, cluster, follow=True, insecure=insecure)


def stop(run: RunArgument, cluster: ClusterOption = "local", insecure: InsecureOption = False, json_: JsonOption = False) -> None:
    """Let a submitted run save its state and stop; `submit --resume` goes on with it."""
    with errors(json_):
        from raymill.cluster import spec, submitted

        told = submitted.stop(cluster, spec.load_cluster(cluster, insecure=insecure), run)
        emit(told, json_, lambda console: show_values(console, told))


def _local(read: Any, name: str) -> Any:
    """The spec, if it is one of this machine's."""
    from raymill.errors import InputError, Problem

    if read.kind != "local":
        fix = "Start and end it where it is; `submit`, `ps`, `logs` and `stop` work from here."
        raise InputError([Problem(f"cluster/{name}.yaml kind", repr(read.kind), "'local'", fix)])
    return read


def _show_status(told: dict[str, Any], json_: bool) -> None:
    def show(console: Console) -> None:
        values: dict[str, Any] = {key: told[key] for key in ("name", "address", "dashboard", "token_file") if key in told}
        if mlflow := told.get("mlflow"):
            values["mlflow"] = f"{mlflow['address']}, {'runs' if mlflow['runs'] else 'does not run'}"
            values |= {"mlflow user": mlflow["user"], "mlflow password_file": mlflow["password_file"]}
        show_values(console, values)
        show_table(
            console, ("process", "CPUs", "runs"), [(node["pid"], node["num_cpus"], node["runs"]) for node in told["nodes"]]
        )

    emit(told, json_, show)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _end(told: dict[str, Any]) -> None:
    if told["status"] != "SUCCEEDED":
        raise typer.Exit(told["exit_code"] or 1)


def _when(ms: int | None) -> str | None:
    return moment(ms / 1000) if ms else None
