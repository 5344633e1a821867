"""From a job's name and the command line's overrides to a checked spec, and from the spec to the job's own code.

In time order: `find_job` finds the file; `load_job` reads it as strict YAML, lays the overrides over it, checks types
and ranges (`spec`) and whether what it names exists (`check`), and raises every problem of all these steps at once;
`examine_job` does the same and hands the problems over, for who wants to look for more. Nothing of the job has run by
then, and neither torch nor Ray is imported. Only `import_pipeline` and `import_task` turn a string into running code;
`resolved` is the record of the job.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from raymill.config import strict_yaml
from raymill.config.code_lookup import Packages, argument_names, check_names, find_code, packages_of, project_packages
from raymill.config.signature import UNKNOWN_ARGUMENT, shortened, without_quotes
from raymill.config.spec import JobSpec
from raymill.errors import InputError, Problem, did_you_mean, nearest
from raymill.own_code.seams import IMPORT, PIPELINE, TASK, calling, problem
from raymill.own_code.traces import definition
from raymill.paths import project_root
from raymill.redaction import find_secrets

if TYPE_CHECKING:
    from raymill.task import Pipeline, Schema, Task

MAX_INDEX_DIGITS = 9
MAX_SHOWN_LETTERS = 200

NOTHING_FITTED: Mapping[str, bytes] = MappingProxyType({})
NO_INPUTS: Mapping[str, Any] = MappingProxyType({})

UNKNOWN_FIELD = "a known field"
"""What is expected where there is none of this name."""

_PLAIN_TYPES: dict[str, Callable[[Any], bool]] = {
    "int_type": lambda value: type(value) is int,
    "float_type": lambda value: type(value) in (int, float),
    "bool_type": lambda value: isinstance(value, bool),
}
"""Pydantic's errors about a plain type -> whether a value is of it."""

_FIELD_PATH = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class LoadedJob:
    """A checked job and where each of its values stands.

    Attributes:
        path: the job file.
        lines: dotted field path ("loop.epochs") -> line in the file; without what an override has replaced.
        overridden: field paths that the command line has set.
        problems: all that is wrong with it, which is nothing when it comes from `load_job`.
        faults: the field paths of the problems. There, `spec` may hold a default instead of the file's value.
    """

    spec: JobSpec
    path: Path
    lines: Mapping[str, int]
    overridden: frozenset[str] = field(default=frozenset())
    problems: tuple[Problem, ...] = ()
    faults: frozenset[str] = field(default=frozenset())

    def is_sound(self, *fields: str) -> bool:
        """Whether nothing is wrong with these fields, with what they hold, or with what holds them."""
        return not any(_within(fault, fields) for fault in self.faults) and not any(_within(name, self.faults) for name in fields)

    def where(self, field: str) -> str:
        """The place of a field, for messages: "jobs/mnist/job.yaml:7 loop.epochs", or "--set loop.epochs"."""
        return _where(self.path, self.lines, self.overridden, field)


def find_job(name: str) -> Path:
    """The job file that a name means: a YAML file, a folder with job.yaml, or a folder under the project's jobs/.

    Raises:
        InputError: when there is none; names the nearest job.
    """
    jobs = project_root() / "jobs"
    files = [Path(name), project_root() / name] if name.endswith((".yaml", ".yml")) else []
    for candidate in [*files, Path(name, "job.yaml"), jobs / name / "job.yaml"]:
        if os.path.isfile(candidate):
            return candidate
    known = [file.parent.name for file in jobs.glob("*/job.yaml")]
    if known:
        fix = did_you_mean(Path(name).parent.name if name.endswith("job.yaml") else Path(name).name, known)
    else:
        fix = f"There are no jobs in {jobs}: go to your project's folder, or make one with `raymill init DIR`."
    raise InputError([Problem("job", shortened(name), "a job file, its folder, or the name of a job", fix)])


def load_job(job: str | Path, overrides: Sequence[str] = ()) -> LoadedJob:
    """Read and check a job. Runs none of its code.

    Args:
        job: what `find_job` takes.
        overrides: "loop.epochs=1": a field path and a value in strict YAML; later ones win.

    Raises:
        InputError: with every problem of the file, the overrides and what they name, in the order of the file.
    """
    examined = examine_job(job, overrides)
    if examined.problems:
        raise InputError(examined.problems)
    return examined


def examine_job(job: str | Path, overrides: Sequence[str] = ()) -> LoadedJob:
    """As `load_job`, but a job that is wrong in places is returned with its problems.

    Raises:
        InputError: when too little of the job is right to go on with it, or an override cannot be applied.
    """
    path = find_job(str(job))
    packages = project_packages(project_root())
    with path.open("rb") as file:
        document = strict_yaml.parse(file.read(strict_yaml.MAX_BYTES + 1))
    values, problems = document.value, list(document.problems)
    if not isinstance(values, dict):
        if "" not in document.unreadable:
            fix = "Write one field a line, such as name: mnist."
            problems.append(Problem("", shortened(values), "a mapping of fields to values", fix))
        raise InputError(_placed(problems, path, document.lines, frozenset()))

    overridden, override_problems = apply_overrides(values, overrides)
    lines = {name: line for name, line in document.lines.items() if not _within(name, overridden)}
    problems = [problem for problem in problems if not _within(problem.where, overridden)]
    unreadable = {name for name in document.unreadable if not _within(name, overridden)}
    spec, spec_problems = validated(values)
    secrets = _secret_problems(values)
    # What else is wrong with a secret is not said: it would be repeated.
    hidden = {problem.where for problem in secrets}
    others = _with_full_paths([*spec_problems, *check_names(values, packages)], values, packages)
    judged = [*(problem for problem in others if not _within(problem.where, hidden)), *secrets]
    problems += [problem for problem in judged if problem.where not in unreadable]
    placed = (*_placed(problems, path, lines, overridden), *override_problems)
    faults = frozenset(problem.where for problem in problems)
    if spec is None:
        spec, _ = validated(_without(values, {problem.where for problem in spec_problems}))
    if spec is None or override_problems or "" in faults:
        raise InputError(placed)
    return LoadedJob(spec, path, lines, overridden, placed, faults)


def read_values(path: Path) -> dict[str, Any]:
    """The values of a YAML file that belongs to a job, read as strictly.

    Raises:
        InputError: with everything that is wrong with it as YAML.
    """
    with path.open("rb") as file:
        document = strict_yaml.parse(file.read(strict_yaml.MAX_BYTES + 1))
    problems = list(document.problems)
    if not isinstance(document.value, dict) and not problems:
        problems.append(Problem("", shortened(document.value), "a mapping of fields to values", "Write one field a line."))
    if problems:
        raise InputError(_placed(problems, path, document.lines, frozenset()))
    values: dict[str, Any] = document.value
    return values


def import_pipeline(spec: JobSpec, fitted: Mapping[str, bytes] = NOTHING_FITTED) -> Pipeline:
    """Import the job's pipeline function and call it with `spec.data`, and with `fitted` if it has such a parameter.

    The job's own exceptions pass through.

    Raises:
        InputError: when it may not be imported, cannot be, or returns something else.
    """
    from raymill.task import Pipeline

    function = _import_code(spec.pipeline, "pipeline", "function")
    with calling(PIPELINE, spec.data):
        made = function(**spec.data, **_wanted(function, fitted=fitted))
    if not isinstance(made, Pipeline):
        fix = f"Let {spec.pipeline} return raymill.task.Pipeline(...)."
        raise InputError([Problem("pipeline", f"a function that returned {shortened(made)}", "a Pipeline", fix)])
    return made


def import_task(
    spec: JobSpec, schema: Schema, fitted: Mapping[str, bytes] = NOTHING_FITTED, inputs: Mapping[str, Any] = NO_INPUTS
) -> Task:
    """Import the job's task class and make it from `spec.model`, and from those of the rest that it has parameters for.

    Args:
        schema: of the pipeline.
        fitted: what the pipeline has fitted.
        inputs: the models that the job is given, see `trained.model.Trained`.

    Raises:
        InputError: when it may not be imported, cannot be, or lacks `build` or `evaluate`.
    """
    from raymill.task import Task

    task_class = _import_code(spec.task, "task", "class")
    missing = [name for name in ("build", "evaluate") if getattr(task_class, name, None) in (None, vars(Task)[name])]
    if missing:
        raise InputError(
            [Problem(definition(task_class), f"a task without {name}", f"a method {name}", f"Define {name}.") for name in missing]
        )
    if spec.inputs and not _wanted(task_class, inputs=inputs):
        fix = "Add a parameter `inputs` to __init__, or leave out `inputs:`."
        raise InputError([Problem(definition(task_class), "no parameter `inputs`", "one, as the job has inputs", fix)])
    with calling(TASK, spec.model):
        return cast("Task", task_class(**spec.model, **_wanted(task_class, schema=schema, fitted=fitted, inputs=inputs)))


def _wanted(function: Any, **given: Any) -> dict[str, Any]:
    """What of these a function has a parameter for."""
    return {name: value for name, value in given.items() if name in inspect.signature(function).parameters}


def import_class(import_path: str, field: str, kind: Literal["optimizer", "schedule", "searcher"]) -> Any:
    """Import a job's own optimizer, schedule or searcher class, or a searcher of Ray Tune's.

    Raises:
        InputError: when it may not be imported, or cannot be.
    """
    return _import_code(import_path, field, kind)


def resolved(spec: JobSpec) -> dict[str, Any]:
    """The job as JSON-ready values with every default written out; `JobSpec.model_validate` reads it back equal."""
    return spec.model_dump(mode="json", by_alias=True)


def _import_code(import_path: str, field: str, kind: str) -> Any:
    """Import what an import path names, after the same checks as in `load_job`: a record may come from anywhere.

    The project stays importable, since workers look up the job's classes by name.
    """
    root = project_root()
    own = project_packages(root)
    packages = packages_of(import_path, kind, own)
    find_code(import_path, field, kind, packages)
    name, _, attribute = import_path.partition(":")
    make_importable(root, own.names)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        raise InputError([problem(IMPORT, error, import_path)]) from error
    checked, imported = packages.locate(name), getattr(module, "__file__", None)
    if imported is None or checked is None or not os.path.samefile(imported, checked):
        found = f"{name} already imported from {imported}"
        raise InputError([Problem(field, found, f"the file {checked}", "Start a new Python process in this project.")])
    return getattr(module, attribute)


class _ProjectPackages:
    """Finds the packages of a project at its root, before all others of these names."""

    def __init__(self, root: Path, names: Collection[str]) -> None:
        self.root, self.names = root, names

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """The module of this name at the root, if it is one of the project's."""
        if path is not None or name not in self.names:
            return None
        return PathFinder.find_spec(name, [str(self.root)])


def make_importable(root: Path, names: Collection[str]) -> None:
    """Let this process import a project's packages, and whatever else is at its root after all libraries.

    A file at the root that has a library's name is not taken for the library.
    """
    known = [finder for finder in sys.meta_path if isinstance(finder, _ProjectPackages)]
    if not any(finder.root == root and finder.names == names for finder in known):
        sys.meta_path[:] = [_ProjectPackages(root, names), *(finder for finder in sys.meta_path if finder not in known)]
    sys.path[:] = [*(entry for entry in sys.path if entry != str(root)), str(root)]


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> tuple[frozenset[str], list[Problem]]:
    """Set the overrides in `values`; return the field paths that were set, and problems with their final place."""
    done: set[str] = set()
    problems = []
    for override in overrides:
        name, equals, text = override.partition("=")
        where = f"--set {name if len(name) <= MAX_SHOWN_LETTERS else shortened(name)}"
        if not equals or not _FIELD_PATH.fullmatch(name):
            fix = "Write for example --set loop.epochs=1."
            shown = override if len(override) <= MAX_SHOWN_LETTERS and override.isprintable() else shortened(override)
            problems.append(Problem(f"--set {shown}", shortened(override), "a field path, '=', a value", fix))
            continue
        if name.count(".") >= strict_yaml.MAX_DEPTH:
            expected = f"at most {strict_yaml.MAX_DEPTH} levels"
            problems.append(Problem(f"--set {shortened(name)}", f"{name.count('.') + 1} levels", expected, "Set a field above."))
            continue
        document = strict_yaml.parse(text.encode("utf-8", "surrogateescape"))
        problems += [replace(problem, where=where) for problem in document.problems]
        if document.problems:
            continue
        problem = _set(values, name.split("."), document.value)
        if problem is None:
            done.add(name)
        else:
            problems.append(replace(problem, where=where))
    return frozenset(done), problems


def _set(values: dict[str, Any], parts: Sequence[str], value: Any) -> Problem | None:
    """Set one value at a path, making the mappings on the way; a Problem when something else stands on the way."""
    inner: Any = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(inner, dict):
            if not last and inner.get(part) is None:
                inner[part] = {}
            key: Any = part
        elif isinstance(inner, list) and (index := _index(part)) is not None and index < len(inner):
            key = index
        else:
            above = ".".join(parts[:depth])
            expected = f"a number below {len(inner)} after {above}" if isinstance(inner, list) else "no deeper field"
            return Problem("", f"{shortened(part)}, while {above} is {shortened(inner)}", expected, f"Set {above} itself.")
        if last:
            inner[key] = value
        else:
            inner = inner[key]
    return None


def _index(part: str) -> int | None:
    """The number of an item of a list; None for what is none. Python refuses to convert thousands of digits."""
    return int(part) if part.isdecimal() and len(part) <= MAX_INDEX_DIGITS else None


def _secret_problems(values: dict[str, Any]) -> list[Problem]:
    fix = "A job is recorded in the run and the model: let the pipeline or the task read it from the environment instead."
    return [Problem(where, "a literal secret", "no secrets in a job", fix) for where in find_secrets(values)]


def validated(values: dict[str, Any]) -> tuple[JobSpec | None, list[Problem]]:
    """Types and ranges by the spec's models."""
    try:
        return JobSpec.model_validate(values), []
    except ValidationError as error:
        found: list[dict[str, Any]] = [dict(details) for details in error.errors(include_url=False)]
        # One that is only spelled wrongly is not missing too.
        unknown = [one for one in found if one["type"] == "extra_forbidden"]
        meant = {(*one["loc"][:-1], nearest(str(one["loc"][-1]), _fields_beside(_path(one)))) for one in unknown}
        return None, [_translated(one) for one in found if one["type"] != "missing" or one["loc"] not in meant]


def _without(values: dict[str, Any], faults: Collection[str]) -> dict[str, Any]:
    """The values without those at these field paths; of a list that holds one, nothing is kept."""
    kept = {}
    for name, value in values.items():
        inside = [fault.removeprefix(f"{name}.") for fault in faults if fault.startswith(f"{name}.")]
        if name not in faults and (isinstance(value, dict) or not inside):
            kept[name] = _without(value, inside) if inside else value
    return kept


def _path(details: Mapping[str, Any]) -> list[str]:
    """The field path of a pydantic error."""
    left = [str(part) for part in details["loc"]]
    parts = []
    while left:
        parts.append(left.pop(0))
        # Pydantic puts the tag of the chosen shape there, and again below the name of an objective.
        if parts[-1] in ("optimizer", "schedule") and left and left.pop(0) == "several" and parts == ["optimizer"]:
            parts += left[:1]
            del left[:2]
    return parts


def _translated(details: dict[str, Any]) -> Problem:
    """One pydantic error in our terms."""
    parts = _path(details)
    where, name, kind = ".".join(parts), parts[-1], details["type"]
    fields = _fields_beside(parts)
    info = fields.get(name)
    meaning = f" ({info.description})" if info is not None and info.description else ""
    if kind == "extra_forbidden":
        return Problem(where, f"the unknown field {shortened(name)}", UNKNOWN_FIELD, did_you_mean(name, fields))
    if kind == "missing":
        return Problem(where, "nothing", f"a value{meaning}", f"Add {where}.")
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message.replace("valid dictionary or instance of", "mapping of fields for").replace("dictionary", "mapping")
    fits_bare = _PLAIN_TYPES.get(kind, lambda value: False)
    fix = without_quotes(details["input"], fits_bare) or f"Change {where}."
    return Problem(where, shortened(details["input"]), f"{message}{meaning}", fix)


def _with_full_paths(problems: list[Problem], values: dict[str, Any], packages: Packages) -> list[Problem]:
    """The problems; where an unknown name is known elsewhere in a job, the fix is its full path: `lr` to `optimizer.lr`."""
    if not any(problem.expected in (UNKNOWN_FIELD, UNKNOWN_ARGUMENT) for problem in problems):
        return problems
    fields = _fields_of(JobSpec)
    known = {"": {*fields}} | {name: {*_fields_of(one.annotation)} for name, one in fields.items() if name != "search"}
    for section, names in argument_names(values, packages).items():
        known[section] |= names

    def improved(problem: Problem) -> Problem:
        own, _, name = problem.where.rpartition(".")
        meant = [(section, field) for section, names in known.items() for field in sorted(names) if field.lower() == name.lower()]
        if problem.expected not in (UNKNOWN_FIELD, UNKNOWN_ARGUMENT) or not meant or own in dict(meant):
            return problem
        paths = [f"{section}.{field}".lstrip(".") for section, field in meant]
        return replace(problem, fix=f"Did you mean {' or '.join(map(repr, paths))}?")

    return [improved(problem) for problem in problems]


def _fields_beside(parts: Sequence[str]) -> dict[str, FieldInfo]:
    """The fields of the model that holds the last part of a field path, by the names used in the file."""
    fields = _fields_of(JobSpec)
    for part in parts[:-1]:
        if part in fields:
            fields = _fields_of(fields[part].annotation)
    return fields


def _fields_of(annotation: Any) -> dict[str, FieldInfo]:
    """The fields of the first model in an annotation."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return {info.alias or name: info for name, info in annotation.model_fields.items()}
    return next((fields for inner in get_args(annotation) if (fields := _fields_of(inner))), {})


def _within(name: str, fields: Collection[str]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _nearest(field: str, known: Collection[str]) -> str | None:
    """The field itself or the nearest one above it that is known; "" is above all."""
    while field and field not in known:
        field = field.rpartition(".")[0]
    return field if field in known else None


def _where(path: Path, lines: Mapping[str, int], overridden: Collection[str], field: str) -> str:
    nearest = _nearest(field, {*lines, *overridden})
    if nearest in overridden:
        return f"--set {field}"
    line = "" if nearest is None else f":{lines[nearest]}"
    full = path.resolve()
    file = full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else path
    return f"{file}{line} {field}".rstrip()


def _placed(problems: Sequence[Problem], path: Path, lines: Mapping[str, int], overridden: Collection[str]) -> list[Problem]:
    """Problems with their field paths made into places, in the order of the file, those of overrides last."""

    def line(problem: Problem) -> float:
        nearest = _nearest(problem.where, {*lines, *overridden})
        return float("inf") if nearest is None or nearest in overridden else lines[nearest]

    return [replace(p, where=_where(path, lines, overridden, p.where)) for p in sorted(problems, key=line)]
