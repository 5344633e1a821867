"""Signatures read from source text: which arguments a class or function takes, without importing it.

A module is parsed, never run. A name is followed through `from x import name` and through base classes as far as
`locate` finds source files; a class whose base lies beyond that is *open*: any argument may be meant for the base.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from raymill.config import strict_yaml
from raymill.errors import Problem, did_you_mean, nearest

UNKNOWN_ARGUMENT = "a known argument"
"""What is expected where there is none of this name."""

Locate = Callable[[str], Path | None]
"""module name -> its source file, or None where it may not be looked for or is not there."""

_NO_INIT = frozenset({"object", "ABC", "Generic", "Protocol", "Task"})
_LISTS = frozenset({"list", "List", "Sequence", "Iterable", "Collection", "set", "Set", "frozenset"})
_TUPLES = frozenset({"tuple", "Tuple"})
_DICTS = frozenset({"dict", "Dict", "Mapping", "MutableMapping"})
_SCALARS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "Path": (str,),  # a file can only hold the text of a path
    "PathLike": (str,),
    "None": (type(None),),
    **{name: (list,) for name in (*_LISTS, *_TUPLES)},
    **{name: (dict,) for name in _DICTS},
}


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        required: it has no default.
        annotation: the text of its type, with the module's own type aliases written out; "" where there is none.
        nullable: its default is None, whatever the annotation says.
    """

    name: str
    required: bool
    annotation: str = ""
    nullable: bool = False


@dataclass(frozen=True)
class Signature:
    """What a class or function takes.

    Attributes:
        kind: "class" or "function".
        parameters: by name, in order, without self, *args and **kwargs.
        open: arguments beyond `parameters` may be taken too (`**kwargs`, or a base class that cannot be read).
    """

    kind: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    open: bool = False


@dataclass(frozen=True)
class Module:
    """What the top level of a source file defines.

    Attributes:
        definitions: classes and functions written in it.
        imports: local name -> (module, name there), of each `from module import name`.
        aliases: name -> expression, of each plain assignment; type aliases among them.
        typing_imports: as `imports`, of those under `if TYPE_CHECKING`: they may stand in annotations, and nowhere else.
    """

    name: str
    definitions: Mapping[str, ast.ClassDef | ast.FunctionDef]
    imports: Mapping[str, tuple[str, str]]
    aliases: Mapping[str, ast.expr]
    typing_imports: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def read_module(name: str, locate: Locate) -> Module | None:
    """Parse a module's source.

    Returns:
        None when `locate` finds no file.

    Raises:
        SyntaxError, ValueError: when the file is not Python.
    """
    path = locate(name)
    if path is None:
        return None
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    definitions: dict[str, ast.ClassDef | ast.FunctionDef] = {}
    imports: dict[str, tuple[str, str]] = {}
    aliases: dict[str, ast.expr] = {}
    typing_imports: dict[str, tuple[str, str]] = {}
    for node in ast.parse(path.read_bytes(), filename=str(path)).body:
        for bound in _bound_names(node):
            # What is bound last is what an import gets.
            definitions.pop(bound, None)
            imports.pop(bound, None)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node.module or "", node.level, package)
            imports.update({alias.asname or alias.name: (source, alias.name) for alias in node.names})
        elif _is_typing_only(node):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom):
                    source = _absolute(inner.module or "", inner.level, package)
                    typing_imports.update({alias.asname or alias.name: (source, alias.name) for alias in inner.names})
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            aliases[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            aliases[node.target.id] = node.value
    return Module(name, definitions, imports, aliases, typing_imports)


def _is_typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING"


def _bound_names(node: ast.stmt) -> set[str]:
    """The names that a top-level statement may bind, however deep in it; under `if TYPE_CHECKING` none at run time."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if _is_typing_only(node):
        return set()
    names: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in inner.names}
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store | ast.Del):
            names.add(inner.id)
        elif isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(inner.name)
    return names


def find_definition(
    module: Module, name: str, locate: Locate, seen: frozenset[tuple[str, str]] = frozenset()
) -> tuple[Module, ast.ClassDef | ast.FunctionDef] | None:
    """Where a name of a module is defined, followed through imports; None when that is nowhere `locate` reaches."""
    if name in module.definitions:
        return module, module.definitions[name]
    if name not in module.imports or (module.name, name) in seen:
        return None
    source, original = module.imports[name]
    other = read_module(source, locate)
    return find_definition(other, original, locate, seen | {(module.name, name)}) if other else None


def is_marked(module: Module, name: str, home: str, mark: str, locate: Locate) -> bool:
    """Whether a class derives from the class `mark` of the module `home`, or a function is annotated to return one.

    Only what is written there counts: bases and annotations are followed through imports, nothing is run.
    """
    found = find_definition(module, name, locate)
    if found is None:
        return False
    place, node = found
    if isinstance(node, ast.FunctionDef):
        return node.returns is not None and _means(node.returns, place, home, mark)
    return _derives(node, place, home, mark, locate, frozenset())


def defines(module: Module, name: str, method: str, locate: Locate, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a class, or one that it derives from in a file that `locate` reaches, defines a method."""
    found = find_definition(module, name, locate)
    if found is None or not isinstance(found[1], ast.ClassDef) or (key := f"{found[0].name}:{found[1].name}") in seen:
        return False
    if any(isinstance(item, ast.FunctionDef) and item.name == method for item in found[1].body):
        return True
    bases = [base.id for base in found[1].bases if isinstance(base, ast.Name)]
    return any(defines(found[0], base, method, locate, seen | {key}) for base in bases)


def _derives(node: ast.ClassDef, module: Module, home: str, mark: str, locate: Locate, seen: frozenset[str]) -> bool:
    for base in node.bases:
        if _means(base, module, home, mark):
            return True
        found = find_definition(module, base.id, locate) if isinstance(base, ast.Name) else None
        key = f"{found[0].name}:{found[1].name}" if found else ""
        if not found or not isinstance(found[1], ast.ClassDef) or key in seen:
            continue
        if _derives(found[1], found[0], home, mark, locate, seen | {key}):
            return True
    return False


def _means(expression: ast.expr, module: Module, home: str, mark: str) -> bool:
    """Whether an expression of a module stands for this name: imported, reached through its module, or as text."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        return _means(ast.parse(expression.value, mode="eval").body, module, home, mark)
    first, _, rest = ast.unparse(expression).partition(".")
    known = {**module.typing_imports, **module.imports}
    if first in known:
        source, original = known[first]
        return f"{source}.{original}" + (f".{rest}" if rest else "") == f"{home}.{mark}"
    return ast.unparse(expression) == f"{home}.{mark}"


def read_signature(module: Module, name: str, locate: Locate) -> Signature | None:
    """The signature of a top-level class or function; None when its definition is nowhere `locate` reaches."""
    found = find_definition(module, name, locate)
    if found is None:
        return None
    home, node = found
    if isinstance(node, ast.FunctionDef):
        return _of_function("function", node, home)
    return _of_class(node, home, locate, frozenset())


def check_arguments(
    signature: Signature,
    arguments: Mapping[str, Any],
    where: str,
    ignore: Collection[str] = (),
    derived: Collection[str] = (),
) -> list[Problem]:
    """Hold arguments from a file against a signature.

    Args:
        where: field path of the arguments; a problem's `where` is this plus the argument's name.
        ignore: parameters that raymill fills in, and the file may not.
        derived: parameters that may be left out though they have no default.
    """
    parameters = {name: item for name, item in signature.parameters.items() if name not in ignore}
    problems = []
    meant = set()
    for name, value in arguments.items():
        parameter = parameters.get(name)
        if parameter is None:
            if name in ignore or not signature.open:
                fix = did_you_mean(str(name), parameters)
                meant.add(nearest(str(name), parameters))
                problems.append(Problem(f"{where}.{name}", f"the argument {name!r}", UNKNOWN_ARGUMENT, fix))
        elif not (value is None and parameter.nullable) and matches(parameter.annotation, value) is False:
            expected = f"a value of type {parameter.annotation}"
            fits_bare = partial(matches, parameter.annotation)
            fix = without_quotes(value, fits_bare) or f"Change {name} to {expected}."
            problems.append(Problem(f"{where}.{name}", shortened(value), expected, fix))
    for name, parameter in parameters.items():
        # One that is only spelled wrongly is not missing too.
        if parameter.required and name not in arguments and name not in derived and name not in meant:
            kind = f" of type {parameter.annotation}" if parameter.annotation else ""
            problems.append(Problem(f"{where}.{name}", "nothing", f"a value{kind}", f"Add {name}; it has no default."))
    return problems


def matches(annotation: str, value: Any) -> bool | None:
    """Whether a plain value (None, bool, int, float, str, list, dict) fits an annotation's text.

    An int fits float; a bool does not fit int. A list fits tuple, text fits Path. A name that is not in the closed
    table says nothing where it stands alone, and fits no plain value inside a union (`float | Tensor` wants a float).

    Returns:
        None when the annotation does not say.
    """
    try:
        return _fits(ast.parse(annotation, mode="eval").body, value, in_union=False)
    except (SyntaxError, ValueError):
        return None


def without_quotes(value: Any, fits: Callable[[Any], bool | None]) -> str | None:
    """What to do about a text that would be right as it stands, were it not in quotes; None where quotes are not to blame."""
    if not isinstance(value, str):
        return None
    bare = strict_yaml.parse(value.encode(errors="replace"))
    if bare.problems or isinstance(bare.value, str) or not fits(bare.value):
        return None
    return f"Write {value} without quotes."


def shortened(value: Any) -> str:
    """The repr of a value, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _absolute(module: str, level: int, package: str) -> str:
    if level == 0:
        return module
    parents = package.split(".")[: 1 - level or None]
    return ".".join(part for part in (*parents, module) if part)


def _of_function(kind: str, node: ast.FunctionDef, module: Module) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    pairs = list(zip(positional, defaults, strict=True))[1 if kind == "class" else 0 :]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parameters = {item.arg: _parameter(item.arg, item.annotation, default, module) for item, default in pairs}
    return Signature(kind, parameters, open=arguments.kwarg is not None)


def _parameter(name: str, annotation: ast.expr | None, default: ast.expr | None, module: Module) -> Parameter:
    text = ast.unparse(_written_out(annotation, module.aliases)) if annotation is not None else ""
    nullable = isinstance(default, ast.Constant) and default.value is None
    return Parameter(name, default is None, text, nullable)


def _of_class(node: ast.ClassDef, module: Module, locate: Locate, seen: frozenset[str]) -> Signature:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _of_function("class", item, module)
    inherited = _of_bases(node, module, locate, seen | {f"{module.name}:{node.name}"})
    if any(_last_name(item) == "dataclass" for item in node.decorator_list):
        own = {parameter.name: parameter for parameter in _dataclass_fields(node, module)}
        return Signature("class", {**inherited.parameters, **own}, inherited.open)
    return inherited


def _of_bases(node: ast.ClassDef, module: Module, locate: Locate, seen: frozenset[str]) -> Signature:
    for base in node.bases:
        name = _last_name(base)
        found = find_definition(module, name, locate) if isinstance(base, ast.Name) else None
        if found is None and name in _NO_INIT:
            continue
        if found is None or isinstance(found[1], ast.FunctionDef) or f"{found[0].name}:{name}" in seen:
            return Signature("class", open=True)
        inherited = _of_class(found[1], found[0], locate, seen)
        if inherited.parameters or inherited.open:
            return inherited
    return Signature("class")


def _dataclass_fields(node: ast.ClassDef, module: Module) -> Iterator[Parameter]:
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        if _last_name(item.annotation) == "ClassVar":
            continue
        default = item.value
        if isinstance(default, ast.Call) and _last_name(default.func) == "field":
            options = {keyword.arg: keyword.value for keyword in default.keywords}
            if isinstance(given := options.get("init"), ast.Constant) and given.value is False:
                continue
            default = options.get("default", options.get("default_factory"))
        yield _parameter(item.target.id, item.annotation, default, module)


def _written_out(annotation: ast.expr, aliases: Mapping[str, ast.expr], depth: int = 4) -> ast.expr:
    """The annotation with the names of type aliases replaced by what they stand for."""

    class WriteOut(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            known = aliases.get(node.id)
            return node if known is None or depth == 0 else _written_out(known, aliases, depth - 1)

    copy = ast.parse(ast.unparse(annotation), mode="eval").body
    result = WriteOut().visit(copy)
    assert isinstance(result, ast.expr)
    return result


def _last_name(node: ast.expr) -> str:
    """`dataclass` of `dataclass`, `dataclasses.dataclass`, `dataclass(frozen=True)`; `Generic` of `Generic[T]`."""
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _fits(node: ast.expr, value: Any, in_union: bool) -> bool | None:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return _fits(ast.parse(node.value, mode="eval").body, value, in_union)
        return value is None if node.value is None else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _any(_fits(side, value, in_union=True) for side in (node.left, node.right))
    name = _last_name(node)
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _fits_subscript(name, inner, value, in_union)
    if name in ("Any", "object"):
        return True
    if name in _SCALARS:
        return type(value) in _SCALARS[name]
    return False if in_union else None


def _fits_subscript(name: str, inner: list[ast.expr], value: Any, in_union: bool) -> bool | None:
    if name == "Literal":
        wanted = [item.value for item in inner if isinstance(item, ast.Constant)]
        return any(type(value) is type(item) and value == item for item in wanted)
    if name == "Annotated":
        return _fits(inner[0], value, in_union)
    if name == "Optional":
        return value is None or _fits(inner[0], value, in_union=True)
    if name == "Union":
        return _any(_fits(item, value, in_union=True) for item in inner)
    if name in _LISTS | _TUPLES and isinstance(value, list):
        if name in _LISTS or (isinstance(inner[-1], ast.Constant) and inner[-1].value is ...):
            return _all(_fits(inner[0], item, in_union) for item in value)
        return len(value) == len(inner) and _all(_fits(*pair, in_union) for pair in zip(inner, value, strict=True))
    if name in _DICTS and isinstance(value, dict):
        pairs = [(inner[0], key) for key in value] + [(inner[-1], item) for item in value.values()]
        return _all(_fits(*pair, in_union) for pair in pairs)
    return False if in_union or name in _SCALARS else None


def _any(answers: Iterator[bool | None]) -> bool | None:
    known = set(answers)
    return True if True in known else None if None in known else False


def _all(answers: Iterator[bool | None]) -> bool | None:
    known = set(answers)
    return False if False in known else None if None in known else True
