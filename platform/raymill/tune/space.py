"""A space laid out: what a trial's values make of the job, and whether any corner of the space is wrong.

Pure: values in, overrides and problems out. Values are laid over the job file as `--set` lays them, so a trial is checked as any
job is.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raymill.config import load
from raymill.config.search import ParameterSpec, SearchSpec, values_of
from raymill.config.spec import JobSpec
from raymill.errors import InputError, Problem

Values = Mapping[str, Any]
"""Field of the job -> a trial's value."""

MOST_CORNERS = 128
"""That are looked at together; of a larger space, each field's ends by themselves."""


def as_overrides(values: Values) -> list[str]:
    """What lays a trial's values over the job file."""
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def is_tried(one: ParameterSpec, values: Values) -> bool:
    """Whether a field is tried at all beside these values."""
    return all(
        name in values and (values[name] in wanted if isinstance(wanted, list) else values[name] == wanted)
        for name, wanted in one.when.items()
    )


def ends(one: ParameterSpec) -> list[Any]:
    """The values of a field at which something may go wrong: all of a choice, else the smallest and the largest."""
    if one.values is not None:
        return list(one.values)
    assert one.low is not None
    assert one.high is not None
    return [int(one.low), int(one.high)] if one.kind == "int" else [one.low, one.high]


def in_order(space: Mapping[str, ParameterSpec]) -> list[str]:
    """The fields, each behind those that decide whether it is tried.

    Raises:
        InputError: two wait for each other, or one waits for what is no field of the space.
    """
    found: list[str] = []
    while len(found) < len(space):
        ready = [name for name in space if name not in found and set(space[name].when) <= set(found)]
        if not ready:
            left = [name for name in space if name not in found]
            problems = [
                Problem(
                    f"search.space.{name}.when", f"{sorted(space[name].when)}", "other fields of the space", "Correct `when`."
                )
                for name in left
            ]
            raise InputError(problems)
        found += ready
    return found


def corners(space: Mapping[str, ParameterSpec]) -> Iterator[Values]:
    """The corners of a space; of one with many, the ends of each field beside the first ends of the others."""
    names = in_order(space)
    choices = {name: ends(space[name]) for name in names}
    count = 1
    for found in choices.values():
        count *= len(found)
    first = {name: found[0] for name, found in choices.items()}
    if count <= MOST_CORNERS:
        whole: Iterator[dict[str, Any]] = (
            dict(zip(names, one, strict=True)) for one in itertools.product(*(choices[name] for name in names))
        )
    else:
        whole = ({**first, name: value} for name in names for value in choices[name])
    for values in whole:
        kept: dict[str, Any] = {}
        for name in names:
            if is_tried(space[name], kept):
                kept[name] = values[name]
        yield kept


def find_problems(
    job: str, overrides: Sequence[str], search: SearchSpec, judge: Callable[[JobSpec], list[Problem]]
) -> list[Problem]:
    """All that is wrong with a space: fields that the job has not, values that do not fit them, corners that cannot be trained.

    Args:
        job: the job file.
        overrides: of the command line.
        judge: what is wrong with a job that is right in itself, beside its data.
    """
    base = {str(problem) for problem in load.examine_job(job, overrides).problems}
    problems: dict[tuple[str, str], Problem] = {}
    wrong: set[str] = set()

    def note(found: Sequence[Problem], values: Values, where: str | None) -> None:
        for problem in found:
            if str(problem) not in base:
                at = f"search.space.{where}" if where else _at(problem, values)
                shown = ", ".join(f"{name}: {value}" for name, value in values.items())
                fix = f"{problem.fix} (tried: {shown})"
                problems.setdefault((at, problem.found), Problem(at, problem.found, problem.expected, fix))

    for name, one in search.space.items():
        for value in ends(one):
            found = _examine(job, [*overrides, *as_overrides({name: value})])
            if isinstance(found, list):
                note(found, {name: value}, name)
                wrong.add(name)
    problems |= {(problem.where, problem.found): problem for problem in _points(search)}
    try:
        in_order(search.space)
    except InputError as error:
        return [*problems.values(), *error.problems]
    sound = {name: one for name, one in search.space.items() if name not in wrong and not set(one.when) & wrong}
    for values in corners(sound) if sound else ():
        loaded = _examine(job, [*overrides, *as_overrides(values), *search.repeats(0)[-1]])
        if isinstance(loaded, list):
            note(loaded, values, None)
        elif not base:
            note(judge(loaded), values, None)
    return list(problems.values())


def _examine(job: str, overrides: Sequence[str]) -> JobSpec | list[Problem]:
    try:
        loaded = load.examine_job(job, overrides)
    except InputError as error:
        return [*error.problems]
    return loaded.spec if not loaded.problems else [*loaded.problems]


def _at(problem: Problem, values: Values) -> str:
    """The field of the space that a problem of a corner is about, or the search's."""
    name = problem.where.removeprefix("--set ")
    return f"search.space.{name}" if name in values else f"search, {problem.where}"


def _points(search: SearchSpec) -> list[Problem]:
    problems = []
    for number, point in enumerate(search.points):
        for name, value in point.items():
            where = f"search.points.{number}.{name}"
            if name not in search.space:
                problems.append(
                    Problem(where, "no field of the space", f"one of {sorted(search.space)}", "Correct or delete it.")
                )
            elif not holds(search.space[name], value):
                problems.append(Problem(where, repr(value), "a value inside the space", "Correct it, or widen the space."))
    return problems


def holds(one: ParameterSpec, value: Any) -> bool:
    """Whether a value is one of a field's."""
    if one.values is not None:
        return any(value == other and type(value) is type(other) for other in one.values)
    if isinstance(value, bool) or not isinstance(value, int | float) or one.low is None or one.high is None:
        return False
    stepped = one.step is None or abs((value - one.low) / one.step - round((value - one.low) / one.step)) < 1e-9
    return one.low <= value <= one.high and stepped and (one.kind != "int" or float(value).is_integer())


def as_it_stands(spec: JobSpec, search: SearchSpec) -> tuple[Values, list[str]]:
    """The job's own values for the fields of the space, and the fields whose value lies outside, which are then suggested."""
    resolved = load.resolved(spec)
    found: dict[str, Any] = {}
    outside = []
    for name in in_order(search.space):
        one = search.space[name]
        if not is_tried(one, found):
            continue
        value: Any = resolved
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if holds(one, value):
            found[name] = float(value) if one.kind in ("uniform", "loguniform") else value
        else:
            outside.append(name)
    return found, outside


def grid(search: SearchSpec) -> list[Values]:
    """The points of a grid, the last field changing fastest."""
    values = [values_of(one) for one in search.space.values()]
    return [dict(zip(search.space, one, strict=True)) for one in itertools.product(*values)]
