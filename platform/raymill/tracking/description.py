"""What people read of a run, a job and a model in MLflow: names, tags, Markdown and a page, from the run's own records. Pure.

A description that somebody has edited in MLflow stays theirs: `signed` ends a text with a comment that nobody sees and that holds
its digest, and `is_ours` tells whether the text is still the one that was signed.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from raymill.task import TRAIN

RUN_ID_TAG = "raymill.run_id"
DESCRIPTION_TAG = "mlflow.note.content"
PARENT_TAG = "mlflow.parentRunId"

TRAINING_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tells MLflow that an experiment holds training runs, neither chats nor evaluations of prompts."""

SHOWN_VERSIONS = ("torch", "ray")
MAX_DESCRIPTION_LETTERS = 4800
"""MLflow takes some more in a tag."""

MAX_MESSAGE_LETTERS = 1500
MAX_METRICS = 20

_RUN_ID = re.compile(r".*-(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)\d\d-([0-9a-f]{3})[0-9a-f]*")
_SIGNATURE = re.compile(r"\n\n<!-- raymill ([0-9a-f]{16}) -->\s*")

# ---------------------------------------------------------------- names and tags


def run_name(run_id: str, job: str) -> str:
    """What a run is called: its date and time (UTC, as in its id) first, so that names that are cut still differ."""
    parts = _RUN_ID.fullmatch(run_id)
    if parts is None:
        return run_id
    _, month, day, hour, minute, mark = parts.groups()
    return f"{month}-{day} {hour}:{minute} {mark} {job}"


def opening_tags(
    run_id: str, job: str, machine: Mapping[str, Any], parent: str | None = None, given: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The tags of a new MLflow run: whose it is, what made it, from which code.

    Args:
        run_id: the raymill run.
        job: the job's name.
        machine: the record of what it runs with, `record.environment`.
        parent: the MLflow run that it is shown beneath, such as that of a search over settings.
        given: what other runs have made for it, see `record.inputs.described`.
    """
    tags = {
        RUN_ID_TAG: run_id,
        "mlflow.user": machine.get("user"),
        "mlflow.source.name": _source(machine, job),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": machine.get("git_commit"),
        "mlflow.source.git.branch": machine.get("git_branch"),
        "mlflow.source.git.repoURL": machine.get("git_remote"),
        "mlflow.source.git.dirty": None if machine.get("git_dirty") is None else str(machine["git_dirty"]).lower(),
        "raymill.command": _command(machine) or None,
        "raymill.python": machine.get("python"),
        **{f"raymill.versions.{name}": machine.get("versions", {}).get(name) for name in SHOWN_VERSIONS},
        PARENT_TAG: parent,
        **{f"raymill.{field}": what for field, what in (given or {}).items()},
    }
    return {key: value for key, value in tags.items() if value}


def _source(machine: Mapping[str, Any], job: str) -> str:
    """What made a run. MLflow shows what follows the last "/" of it, so there is none."""
    program = _command(machine).partition(" ")[0] or "raymill"
    return f"raymill train {job}" if program == "raymill" else program


def _command(machine: Mapping[str, Any]) -> str:
    """The command that began a run, as it was typed but for the folder that its program is in."""
    if not machine.get("command"):
        return ""
    program, *arguments = machine["command"]
    name = PurePath(program).name
    return shlex.join(["raymill" if name == "__main__.py" else name, *arguments])


def attempt_fact(num_workers: int, step: int, time_s: float) -> str:
    """An attempt in a few words."""
    return f"{_count(num_workers, 'worker')} from step {step}, {date(time_s)}"


def date(time_s: float) -> str:
    """A time as people write it, in UTC."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


# ---------------------------------------------------------------- signatures


def signed(text: str) -> str:
    """The text, cut where MLflow would not take all of it, with its signature."""
    text = text[:MAX_DESCRIPTION_LETTERS].rstrip()
    return f"{text}\n\n<!-- raymill {_digest(text)} -->"


def is_ours(note: str | None) -> bool:
    """Whether a description is empty, or still as it was signed; else somebody has edited it."""
    if not note or not note.strip():
        return True
    found = _SIGNATURE.search(note)
    return found is not None and found.end() == len(note) and found.group(1) == _digest(note[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- a run


@dataclass(frozen=True)
class RunFacts:
    """What there is to tell about a run.

    Attributes:
        known: what `catalog.show_run` says of it.
        folder: where its files are.
        machine: the record of what it runs with.
        summary: its summary; empty until there is one.
        model: name, version and alias of its registered model, and why it is not exported where it is not; empty: there is none.
        not_registered: why its model could not be registered.
        pictures: paths of pictures among its artifacts, to be shown.
    """

    known: Mapping[str, Any]
    folder: str
    machine: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    not_registered: str | None = None
    pictures: Sequence[str] = ()


def describe_run(facts: RunFacts) -> str:
    """The run's description: how it went, what to type next, pictures, what ran. The page shows its first lines at once."""
    parts = [_headline(facts), _code_block(_commands(facts))]
    if facts.not_registered:
        parts.append(f"Its model was **not registered**:\n\n{_code_block([facts.not_registered])}")
    if why := facts.model.get("not_exported"):
        parts.append(f"Its model is **not exported**: raymill loads it, MLflow alone does not.\n\n{_code_block([why])}")
    if facts.known["status"] == "failed":
        parts.append(_code_block([str(facts.known["message"])]))
        parts.append(f"What Ray and the workers printed is in `{facts.folder}/ray.log`.")
    mlflow_run = facts.known["mlflow_run_id"]
    parts += [f"![{path}](get-artifact?path={quote(path)}&run_uuid={mlflow_run})" for path in facts.pictures]
    parts.append(_list(_what_ran(facts)))
    return "\n\n".join(parts)


def describe_search(study: str, job: str, summary: Mapping[str, Any], mlflow_run: str, pictures: Sequence[str]) -> str:
    """A search's description: what came of it, what to type next, pictures.

    Args:
        summary: see `tune.outcome.show`.
        pictures: names of pictures among its artifacts.
    """
    best, count = summary["best"], sum(summary["trials"].values())
    states = ", ".join(f"{number} {state}" for state, number in summary["trials"].items())
    wanted = {summary["metric"]: summary["mode"], **summary["also"]}
    aims = ", ".join(f"the {mode} of `{metric}`" for metric, mode in wanted.items())
    parts = [f"A search of {_count(count, 'trial')} ({states}) for {aims}."]
    if summary["limits"]:
        limits = ", ".join(f"`{limit}`" for limit in limits_in_words(summary["limits"]))
        parts += [f"A good trial is inside these limits: {limits}; {summary['outside']} were not."]
    if best:
        values = [(name, f"`{value}`") for name, value in best["values"].items()]
        before = summary["job_as_it_stands"]
        than = f"; the job as it stands has {before:.4g}" if before is not None else ""
        parts += [f"The best is **{best['value']:.4g}**, trial {best['number']}{than}.", _list(values)]
        if summary["front"]:
            numbers = ", ".join(str(one["number"]) for one in summary["front"])
            parts.append(f"No other trial beats these in every metric: {numbers}.")
        sets = " ".join(f"--set {name}={json.dumps(value)}" for name, value in best["values"].items())
        parts.append(_code_block([f"raymill tune show {study}", f"raymill train {job} {sets}"]))
    parts += [f"![{name}](get-artifact?path={quote(name)}&run_uuid={mlflow_run})" for name in pictures]
    return "\n\n".join(parts)


def limits_in_words(limits: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """The limits of a search, each such as "validation/recall >= 0.9".

    Args:
        limits: metric -> least and most.
    """
    signs = {"least": ">=", "most": "<="}
    return [
        f"{name} {signs[side]} {edge:g}" for name, limit in limits.items() for side, edge in limit.items() if edge is not None
    ]


def _headline(facts: RunFacts) -> str:
    known, summary = facts.known, facts.summary
    total = known["num_total_steps"]
    step = f"step {known['step']}" + (f" of {total}" if total else "")
    if known["status"] == "finished":
        best = summary.get("best_step")
        where = f", from the best checkpoint (step {best})" if best not in (None, known["step"]) else ""
        last = {name: value for name, value in known["metrics"].items() if not name.startswith(f"{TRAIN}/")}
        result = _metrics_in_words(summary.get("metrics") or last)
        registered = f" Registered as {_model_link(facts.model)}." if facts.model else ""
        return f"**Finished** at {step}{': ' if result else ''}{result}{where}.{registered}"
    if known["status"] == "failed":
        return f"**Failed** at {step}. Mend the cause, which stands below; then go on with:"
    if known["status"] == "interrupted":
        return f"**Interrupted** at {step}. What was saved is kept; go on with:"
    return f"**Running**: attempt {known['attempts']}, {total} steps. Where it is, and how to go on should it stop:"


def _commands(facts: RunFacts) -> list[str]:
    run_id, status, model = facts.known["run_id"], facts.known["status"], facts.model
    if status == "finished":
        return [f"raymill evaluate {model['name']}@{model['alias']}" if model else f"raymill evaluate {run_id}"]
    resume = f"raymill train --resume {run_id}"
    return [resume] if status in ("failed", "interrupted") else [f"raymill runs show {run_id}", resume]


def _what_ran(facts: RunFacts) -> list[tuple[str, str]]:
    known, machine, summary = facts.known, facts.machine, facts.summary
    rows = [("run", f"`{known['run_id']}`")]
    if command := _command(machine):
        rows.append(("command", f"`{command}`"))
    if machine.get("git_commit"):
        changes = ", with changes that are not committed" if machine.get("git_dirty") else ""
        branch = f" on {machine['git_branch']}" if machine.get("git_branch") else ""
        rows.append(("code", f"commit `{machine['git_commit'][:10]}`{branch}{changes}"))
    if known["started_s"]:
        rows.append(("started", date(known["started_s"])))
    rows.append(("attempts", str(known["attempts"])))
    if summary and known["status"] == "finished":
        counts = summary["rows"]
        used = f"{counts['used']:,} of {counts['total']:,}"
        rows.append(("rows trained on", f"{used}, {counts['skipped']:,} left out" if counts["skipped"] else used))
        workers = _count(summary["num_workers"], "worker")
        rows.append(("speed", f"{summary['rows_per_s']:,.0f} rows/s on {workers}"))
        rows.append(("weights", f"SHA-256 `{summary['weights_sha256']}`"))
    return [*rows, ("files", f"`{facts.folder}`")]


def _metrics_in_words(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} **{value:.4g}**" for name, value in list(metrics.items())[:MAX_METRICS])


def _model_link(model: Mapping[str, Any]) -> str:
    name, version = model["name"], model["version"]
    return f"[{name} version {version}](#/models/{quote(name)}/versions/{version})"


# ---------------------------------------------------------------- a job, a model


def describe_experiment(job: str) -> str:
    """An experiment's description."""
    return f"The runs of the job {job}. To make one: raymill train {job}"


def describe_model(job: str) -> str:
    """A registered model's description."""
    return f"What the job **{job}** trained; a version for each run that finished."


def describe_version(name: str, alias: str, run_id: str, step: int, metrics: Mapping[str, float], num_rows: int) -> str:
    """A model version's description, in Markdown.

    Args:
        name: the registered model.
        alias: the alias that is moved to it.
        run_id: the run that trained it.
        step: the optimizer step its weights are from.
        metrics: name -> value, of these weights.
        num_rows: rows of a training epoch.
    """
    origin = f"The best weights, step {step}, of run `{run_id}`, trained on {num_rows:,} rows an epoch."
    measured = _list((metric, f"**{value:.6g}**") for metric, value in list(metrics.items())[:MAX_METRICS])
    load = [f"raymill evaluate {name}@{alias}", f'raymill.model("{name}@{alias}").predict(...)']
    return "\n\n".join(filter(None, [origin, measured, _code_block(load)]))


# ---------------------------------------------------------------- the plan

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 24px; color: #1f2933 }}
table {{ border-collapse: collapse }}
th, td {{ text-align: left; vertical-align: top; padding: 6px 16px 6px 0; border-bottom: 1px solid #e4e7eb }}
td:nth-child(2) {{ font-variant-numeric: tabular-nums; white-space: nowrap }}
td:nth-child(3) {{ color: #52606d }}
</style></head><body><h1>{title}</h1><table><thead><tr><th>number</th><th>value</th><th>why</th></tr></thead><tbody>
{rows}
</tbody></table></body></html>
"""


def plan_page(job: str, plan: Mapping[str, Any]) -> str:
    """The plan as a page: every derived number with its reason."""
    reasons = plan.get("reasons", {})
    rows = [
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in (name, _number(value), reasons.get(name, ""))) + "</tr>"
        for name, value in plan.items()
        if name not in ("reasons", "format_version")
    ]
    return _PAGE.format(title=f"Plan of {html.escape(job)}", rows="\n".join(rows))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- Markdown


def _code_block(lines: Iterable[str]) -> str:
    text = "\n".join(lines)[:MAX_MESSAGE_LETTERS].replace("```", "'''")
    return f"```\n{text}\n```"


def _list(rows: Iterable[tuple[str, str]]) -> str:
    # MLflow draws the columns of a table without a space between them.
    return "\n".join(f"- {name}: {value}" for name, value in rows)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
