"""Do the things that a job names exist, and do they take what the job gives them? Found out without running them.

A job names code in two places, `task` and `pipeline`, and classes of torch in two, `optimizer` and `schedule`. All four
are looked up in source files (see `signature`); nothing is imported, torch neither. The packages that code may come
from are a closed set, checked before anything is looked up, and so is where the name is really defined: a name that
a job's module only imports from elsewhere is not the job's code.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymill.config.signature import (
    Module,
    Signature,
    check_arguments,
    defines,
    find_definition,
    is_marked,
    read_module,
    read_signature,
    shortened,
)
from raymill.config.spec import JobSpec, OptimizerSpec, ScheduleSpec
from raymill.errors import InputError, Problem, did_you_mean, nearest

ALLOWED = frozenset({"jobs", "pipelines"})

LIGHTNING = ("raymill.adapters.lightning", "LightningTask")
"""The adapter that takes its optimizers from the module."""

MARKS = {
    "class": (("raymill.task", "Task"), LIGHTNING, ("raymill.adapters.transformers", "TransformersTask")),
    "function": (("raymill.task", "Pipeline"),),
    "optimizer": (("torch.optim", "Optimizer"),),
    "schedule": (("torch.optim.lr_scheduler", "LRScheduler"),),
    "searcher": (("ray.tune.search", "Searcher"), ("ray.tune.search.searcher", "Searcher")),
}
"""What code must say of itself before a job may name it: a class derives from one of these, a function returns a Pipeline."""

FILLED = {"class": {"schema", "fitted", "inputs"}, "function": {"fitted"}}
"""Arguments of a task and of the function that makes a pipeline that do not come from the job."""

MARK_PROBLEMS = {
    "class": ("a subclass of raymill.task.Task", "Write `class {name}(Task):`."),
    "optimizer": ("a subclass of torch.optim.Optimizer", "Write `class {name}(torch.optim.Optimizer):`."),
    "schedule": (
        "a subclass of torch.optim.lr_scheduler.LRScheduler",
        "Write `class {name}(torch.optim.lr_scheduler.LRScheduler):`.",
    ),
    "searcher": ("a subclass of ray.tune.search.Searcher", "Write `class {name}(Searcher):`."),
    "function": ("a function annotated with what it returns, a raymill.task.Pipeline", "Write `def {name}(...) -> Pipeline:`."),
}
"""Per kind: what was expected, and what to do."""

# A part may not begin with an underscore, and every letter is ASCII, so no dunder and no look-alike gets through.
_IMPORT_PATH = re.compile(r"([A-Za-z][A-Za-z0-9_]*(?:\.[A-Za-z][A-Za-z0-9_]*)*):([A-Za-z][A-Za-z0-9_]*)")
_PACKAGE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class _Kind:
    """One family of torch classes that a job may name, or its own after their kind; see `MARKS`."""

    code: str
    module: str
    own_fields: frozenset[str]
    filled: frozenset[str]
    derived: frozenset[str]
    bases: frozenset[str]
    refused: Mapping[str, str]


_OPTIMIZER = _Kind(
    code="optimizer",
    module="torch.optim",
    own_fields=frozenset(OptimizerSpec.model_fields),
    filled=frozenset({"params"}),
    derived=frozenset(),
    bases=frozenset({"Optimizer"}),
    refused={"LBFGS": "its step must be able to compute the loss again"},
)
_SCHEDULE = _Kind(
    code="schedule",
    module="torch.optim.lr_scheduler",
    own_fields=frozenset(ScheduleSpec.model_fields),
    filled=frozenset({"optimizer", "last_epoch"}),
    derived=frozenset({"T_max", "total_steps"}),
    bases=frozenset({"Optimizer", "LRScheduler"}),
    refused={
        "LambdaLR": "it needs a function, which a file cannot hold",
        "MultiplicativeLR": "it needs a function, which a file cannot hold",
        "SequentialLR": "it is what a list of schedules makes",
        "ChainedScheduler": "it is made of other schedules",
    },
)


@dataclass(frozen=True)
class Packages:
    """The top-level packages whose source may be looked up.

    Attributes:
        names: the closed set.
        root: the folder that is searched first, before sys.path; None for sys.path alone.
    """

    names: frozenset[str]
    root: Path | None

    def locate(self, module: str) -> Path | None:
        """The source file of a module, or None: not in these packages, or not there."""
        top, *parts = module.split(".")
        files = (_module_file(start.joinpath(*parts)) for start in self.locations(top))
        return next((file for file in files if file is not None), None)

    def modules_in(self, package: str) -> list[str]:
        """Dotted names of the modules in a package, or in the nearest package above it that exists."""
        top, *parts = package.split(".")
        while True:
            folders = [folder for start in self.locations(top) if os.path.isdir(folder := start.joinpath(*parts))]
            if folders or not parts:
                break
            parts.pop()
        prefix = ".".join((top, *parts))
        inside = {item.stem for folder in folders for item in folder.iterdir() if item.is_dir() or item.suffix == ".py"}
        return [f"{prefix}.{name}" for name in sorted(inside) if _PACKAGE.fullmatch(name)]

    def locations(self, top: str) -> list[Path]:
        """Where an import would take a top-level name from: the folders of a package, or one file."""
        if top not in self.names:
            return []
        # Looking for a top-level name runs none of its code; for a dotted name it would run the parents.
        spec = None
        if self.root is not None:
            spec = importlib.machinery.PathFinder.find_spec(top, [str(self.root), *sys.path])
        spec = spec or importlib.util.find_spec(top)
        if spec is None:
            return []
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
        return folders or ([Path(spec.origin)] if spec.origin else [])


_TORCH = Packages(frozenset({"torch"}), None)
_RAY = Packages(frozenset({"ray"}), None)

OF_RAY_TUNE = "ray.tune.search."
"""What the path of a searcher may begin with, beside the packages of the project."""

SEARCHER_FILLED = frozenset({"space", "metric", "mode", "points_to_evaluate", "evaluated_rewards"})
"""Arguments of a searcher that follow from the search."""


def project_packages(root: Path) -> Packages:
    """The packages that a job's code may come from: raymill's own set and those of the project's pyproject.toml.

    Raises:
        InputError: when `[tool.raymill] packages` there is not a list of names.
    """
    file = root / "pyproject.toml"
    if not file.is_file():
        return Packages(ALLOWED, root)
    try:
        section = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {}).get("raymill", {})
    except ValueError as error:
        raise InputError([Problem(file.name, str(error), "TOML in UTF-8", "Correct the file.")]) from error
    names = section.get("packages", [])
    if not isinstance(names, list) or not all(isinstance(name, str) and _PACKAGE.fullmatch(name) for name in names):
        where, fix = f"{file.name} tool.raymill.packages", 'Write packages = ["mypackage"].'
        raise InputError([Problem(where, shortened(names), "a list of top-level package names", fix)])
    return Packages(ALLOWED | frozenset(names), root)


def packages_of(import_path: str, kind: str, own: Packages) -> Packages:
    """The packages that a thing of this kind (see `MARKS`) may come from, for one of this path.

    Args:
        own: those of the project.
    """
    return _RAY if kind == "searcher" and import_path.startswith(OF_RAY_TUNE) else own


def find_code(import_path: str, field: str, kind: str, packages: Packages) -> Signature:
    """The signature of what an import path names.

    Args:
        field: where the import path stands in the job.
        kind: one of `MARKS`.

    Raises:
        InputError: when it may not be named or is not there.
    """
    category = "function" if kind == "function" else "class"
    form = "package.module:function" if kind == "function" else "package.module:Class"

    def refusal(found: str, expected: str, fix: str) -> InputError:
        return InputError([Problem(field, found, expected, fix)])

    match = _IMPORT_PATH.fullmatch(import_path)
    if match is None:
        fix = "Use ASCII letters, digits and underscores; no part begins with an underscore."
        raise refusal(shortened(import_path), f"an import path such as {form}", fix)
    name, attribute = match.groups()
    top = name.partition(".")[0]
    if top not in packages.names:
        fix = "Only the project's pyproject.toml can allow another one, under [tool.raymill] packages."
        raise refusal(f"the package {top!r}", f"one of {', '.join(sorted(packages.names))}", fix)
    try:
        module = read_module(name, packages.locate)
        if module is None:
            fix = did_you_mean(name, packages.modules_in(name.rpartition(".")[0] or top))
            found_in = " or ".join(map(str, packages.locations(top))) or f"a package {top!r}, which is not there"
            raise refusal(f"the module {name!r}", f"a source file in {found_in}", fix)
        signature = read_signature(module, attribute, packages.locate)
        if signature is None or signature.kind != category:
            fix = did_you_mean(attribute, _definitions(module, category, packages))
            raise refusal(f"{attribute!r}", f"a {category} at the top level of {name}, from an allowed package", fix)
        expected, fix = MARK_PROBLEMS[kind]
        if not any(is_marked(module, attribute, *mark, packages.locate) for mark in MARKS[kind]):
            raise refusal(f"{attribute!r}, a {category} without the mark of one", expected, fix.format(name=attribute))
    except (SyntaxError, ValueError) as error:
        raise refusal(f"a file that is not Python: {error}", "a module that can be parsed", "Correct it.") from error
    return signature


def check_names(values: Mapping[str, Any], packages: Packages) -> list[Problem]:
    """Check all code and all torch classes that a job names, and the arguments it gives them.

    Args:
        values: the job as it stands in the file; parts of a wrong type are passed over, since the spec reports them.

    Returns:
        problems whose `where` is the field path.
    """
    problems = _check_code("task", "class", values, "model", packages)
    problems += _check_code("pipeline", "function", values, "data", packages)
    optimizer = values.get("optimizer")
    misspelled = any(nearest(str(name), JobSpec.model_fields) == "optimizer" for name in values.keys() - {*JobSpec.model_fields})
    if optimizer is None and not misspelled and not _makes_optimizers(values, packages):
        fix = "Add optimizer, or define optimizers(model, total_steps) in the task."
        problems.append(Problem("optimizer", "nothing", "an optimizer, such as {kind: AdamW, lr: 1e-3}", fix))
    schedules = {"schedule": values.get("schedule")}
    by_field = {"optimizer": optimizer}
    if isinstance(optimizer, dict) and "kind" not in optimizer:
        by_field = {f"optimizer.{name}": own for name, own in optimizer.items()}
    for field, own in by_field.items():
        groups = {f"{field}.{number}": given for number, given in enumerate(own)} if isinstance(own, list) else {field: own}
        for where, given in groups.items():
            problems += _check_class(where, given, _OPTIMIZER, packages)
            if isinstance(given, dict):
                schedules[f"{where}.schedule"] = given.get("schedule")
    for field, own in schedules.items():
        parts = {f"{field}.{number}": given for number, given in enumerate(own)} if isinstance(own, list) else {field: own}
        for where, given in parts.items():
            problems += _check_class(where, given, _SCHEDULE, packages)
    return problems + _check_searcher(values, packages)


def _check_searcher(values: Mapping[str, Any], packages: Packages) -> list[Problem]:
    """A class that suggests what a search tries, where its sampler is named by an import path."""
    search = values.get("search")
    sampler = search.get("sampler") if isinstance(search, dict) else None
    kind = sampler.get("kind") if isinstance(sampler, dict) else None
    if not isinstance(sampler, dict) or not isinstance(kind, str) or ":" not in kind:
        return []
    try:
        signature = find_code(kind, "search.sampler.kind", "searcher", packages_of(kind, "searcher", packages))
    except InputError as error:
        return list(error.problems)
    arguments = sampler.get("args", {})
    if not isinstance(arguments, dict):
        return []
    return check_arguments(signature, arguments, "search.sampler.args", ignore=SEARCHER_FILLED)


def _makes_optimizers(values: Mapping[str, Any], packages: Packages) -> bool:
    """Whether the task makes its own optimizers, or cannot be looked at."""
    if values.get("task") is None:
        return False
    try:
        find_code(str(values.get("task")), "task", "class", packages)
    except InputError:
        return True
    name, _, attribute = str(values["task"]).partition(":")
    module = read_module(name, packages.locate)
    if module is None:
        return True
    return is_marked(module, attribute, *LIGHTNING, packages.locate) or defines(module, attribute, "optimizers", packages.locate)


def _check_code(field: str, kind: str, values: Mapping[str, Any], arguments_field: str, packages: Packages) -> list[Problem]:
    import_path, arguments = values.get(field), values.get(arguments_field, {})
    if not isinstance(import_path, str):
        return []
    try:
        signature = find_code(import_path, field, kind, packages)
    except InputError as error:
        return list(error.problems)
    if not isinstance(arguments, dict):
        return []
    return check_arguments(signature, arguments, arguments_field, ignore=FILLED[kind])


def argument_names(values: Mapping[str, Any], packages: Packages) -> dict[str, set[str]]:
    """The names of all arguments of what a job names, as far as it is right: by the field they stand in, `model` and so on."""
    names: dict[str, set[str]] = {}
    for field, kind, arguments_field in (("task", "class", "model"), ("pipeline", "function", "data")):
        try:
            signature = find_code(str(values.get(field)), field, kind, packages)
        except InputError:
            continue
        names[arguments_field] = {*signature.parameters} - FILLED[kind]
    for field, torch_kind in (("optimizer", _OPTIMIZER), ("schedule", _SCHEDULE)):
        given = values.get(field)
        module = read_module(torch_kind.module, _TORCH.locate)
        if isinstance(given, dict) and module is not None:
            found = read_signature(module, str(given.get("kind")), _TORCH.locate)
            names[field] = {*found.parameters} - torch_kind.filled if found else set()
    return names


def _check_class(field: str, given: Any, kind: _Kind, packages: Packages) -> list[Problem]:
    """A class of torch by its name, or one of the job's own code by its import path."""
    if not isinstance(given, dict) or not isinstance(name := given.get("kind"), str):
        return []
    if ":" not in name:
        return _check_torch(field, name, given, kind)
    try:
        signature = find_code(name, f"{field}.kind", kind.code, packages)
    except InputError as error:
        return list(error.problems)
    arguments = {key: value for key, value in given.items() if key not in kind.own_fields}
    return check_arguments(signature, arguments, field, ignore=kind.filled, derived=kind.derived)


def _check_torch(field: str, name: str, given: Mapping[str, Any], kind: _Kind) -> list[Problem]:
    packages = _TORCH
    module = read_module(kind.module, packages.locate)
    if module is None:
        return [Problem(f"{field}.kind", f"no source of {kind.module}", "PyTorch", "Install torch.")]
    valid = _torch_classes(module) - kind.bases - set(kind.refused)
    if name not in valid:
        reason = f", which cannot be used here: {kind.refused[name]}" if name in kind.refused else ""
        fix = f"Valid names: {', '.join(sorted(valid))}." if reason else did_you_mean(name, valid)
        return [Problem(f"{field}.kind", f"{shortened(name)}{reason}", f"a class of {kind.module}", fix)]
    signature = read_signature(module, name, packages.locate)
    if signature is None:
        return [Problem(f"{field}.kind", f"no source of {name}", f"a class of {kind.module}", "Install torch again.")]
    arguments = {key: value for key, value in given.items() if key not in kind.own_fields}
    return check_arguments(signature, arguments, field, ignore=kind.filled, derived=kind.derived)


def _torch_classes(module: Module) -> set[str]:
    """Public classes that a module of torch.optim derives from a base, or takes from a module beside it."""
    derived = {name for name, node in module.definitions.items() if isinstance(node, ast.ClassDef) and node.bases}
    taken = {name for name, (source, _) in module.imports.items() if source.startswith("torch.optim.")}
    return {name for name in derived | taken if name[0].isupper()}


def _definitions(module: Module, kind: str, packages: Packages) -> list[str]:
    """Public top-level names of a module that lead to a class or function in the packages."""
    wanted = ast.ClassDef if kind == "class" else ast.FunctionDef
    names = [name for name in (*module.definitions, *module.imports) if not name.startswith("_")]
    found = {name: find_definition(module, name, packages.locate) for name in names}
    return [name for name, there in found.items() if there is not None and isinstance(there[1], wanted)]


def _module_file(stem: Path) -> Path | None:
    for file in (stem / "__init__.py", stem.with_suffix(".py")):
        # A name may be longer than a file's can be, which is an error for pathlib.
        if os.path.isfile(file):
            return file
    return None
