"""Signatures are read from source text, and arguments are held against them, without an import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymill.config.signature import Signature, check_arguments, matches, read_module, read_signature

Reader = Callable[..., "Signature | None"]


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    """Reads the signature of `name` in the module `first` of the given sources."""

    def read(name: str, **sources: str) -> Signature | None:
        for module, source in sources.items():
            (tmp_path / f"{module}.py").write_text(source)

        def locate(module: str) -> Path | None:
            file = tmp_path / f"{module}.py"
            return file if file.is_file() else None

        module = read_module("first", locate)
        assert module is not None
        return read_signature(module, name, locate)

    return read


def names(signature: Signature | None) -> list[str]:
    assert signature is not None
    return list(signature.parameters)


def required(signature: Signature | None) -> list[str]:
    assert signature is not None
    return [name for name, parameter in signature.parameters.items() if parameter.required]


def test_defaults_are_told_from_required_parameters_of_every_kind(read: Reader) -> None:
    signature = read("f", first="def f(a, b: int = 1, *, c: str, d: float | None = None): raise SystemExit")
    assert names(signature) == ["a", "b", "c", "d"]
    assert required(signature) == ["a", "c"]
    assert signature is not None
    assert signature.kind == "function"
    assert signature.parameters["d"].annotation == "float | None"


def test_a_class_drops_self_and_keyword_arguments_leave_it_open(read: Reader) -> None:
    signature = read("A", first="class A:\n    def __init__(self, width: int, depth=2, **more): ...")
    assert names(signature) == ["width", "depth"]
    assert signature is not None
    assert signature.open


@pytest.mark.parametrize(
    "sources",
    [
        {"first": "class B:\n    def __init__(self, width): ...\nclass A(B): ..."},
        {"first": "class Task:\n    def __init__(self, width): ...\nclass A(Task): ..."},
        {
            "first": "from second import B as C\nclass A(C): ...",
            "second": "class B:\n    def __init__(self, width): ...",
        },
        {"first": "from .second import A", "second": "class A:\n    def __init__(self, width): ..."},
        {"first": "@dataclass(frozen=True)\nclass A(Task):\n    count: ClassVar[int] = 0\n    width: int"},
    ],
)
def test_init_is_found_through_bases_imports_and_dataclasses(read: Reader, sources: dict[str, str]) -> None:
    signature = read("A", **sources)
    assert (names(signature), required(signature)) == (["width"], ["width"])


def test_dataclass_fields_follow_those_of_the_base_and_know_their_defaults(read: Reader) -> None:
    source = (
        "@dataclass\nclass B(Task):\n    a: int\n"
        "@dataclass\nclass A(B):\n    b: list[int] = field(default_factory=list)\n    c: int = field(init=False)\n"
        "    d: int = field(repr=False)"
    )
    signature = read("A", first=source)
    assert (names(signature), required(signature)) == (["a", "b", "d"], ["a", "d"])


def test_a_class_with_a_base_out_of_reach_is_open_and_one_with_none_takes_nothing(read: Reader) -> None:
    outside = read("A", first="from elsewhere import B\nclass A(B): ...")
    assert outside is not None
    assert outside.open
    plain = read("A", first="class A(Task): ...")
    assert plain is not None
    assert not plain.open
    assert not plain.parameters


def test_a_name_that_is_imported_from_out_of_reach_has_no_signature(read: Reader) -> None:
    assert read("system", first="from os import system") is None


def test_circular_imports_and_bases_end(read: Reader) -> None:
    assert read("A", first="from second import A", second="from first import A") is None
    looped = read("A", first="class A(B): ...\nclass B(A): ...")
    assert looped is not None
    assert looped.open


def test_type_aliases_of_the_module_are_written_out(read: Reader) -> None:
    signature = read("f", first="Mode = Literal['a', 'b']\ndef f(mode: Mode | None = None): ...")
    assert signature is not None
    assert signature.parameters["mode"].annotation == "Literal['a', 'b'] | None"


@pytest.mark.parametrize(
    ("annotation", "value", "answer"),
    [
        ("int", 3, True),
        ("int", True, False),
        ("int", 3.0, False),
        ("float", 3, True),
        ("float", False, False),
        ("float", "0.1", False),
        ("bool", 1, False),
        ("str", None, False),
        ("None", None, True),
        ("Any", object, True),
        ("list[int]", [1, 2], True),
        ("list[int]", [1, "2"], False),
        ("Sequence[float]", "text", False),
        ("tuple[float, float]", [0.9, 0.999], True),
        ("tuple[float, float]", [0.9], False),
        ("tuple[int, ...]", [1, 2, 3], True),
        ("dict[str, int]", {"a": 1}, True),
        ("dict[str, int]", {"a": "b"}, False),
        ("Literal['min', 'max']", "max", True),
        ("Literal['min', 'max']", "mean", False),
        ("Literal[1]", True, False),
        ("typing.Optional[int]", None, True),
        ("Union[int, str]", 1.5, False),
        ("float | Tensor", 1, True),
        ("float | Tensor", "1e-3", False),
        ("tuple[float | Tensor, float | Tensor]", [0.9, "x"], False),
        ("Path | None", "data", True),
        ("'int | None'", "x", False),
        ("Annotated[int, 'rows']", "x", False),
        ("Tensor", "x", None),
        ("list[Color]", ["red"], None),
        ("", 1, None),
    ],
)
def test_values_against_annotations(annotation: str, value: Any, answer: bool | None) -> None:
    assert matches(annotation, value) is answer


def test_each_wrong_argument_is_one_problem_that_names_the_way_out(read: Reader) -> None:
    signature = read("f", first="def f(root: str, width: int = None, schema=None, T_max=...): ...")
    assert signature is not None
    given = {"widht": 3, "width": "wide", "schema": 1}
    problems = check_arguments(signature, given, "model", ignore={"schema"})
    assert [(problem.where, problem.found) for problem in problems] == [
        ("model.widht", "the argument 'widht'"),
        ("model.width", "'wide'"),
        ("model.schema", "the argument 'schema'"),
        ("model.root", "nothing"),
    ]
    assert problems[0].fix == "Did you mean 'width'?"
    assert problems[3].expected == "a value of type str"
    assert check_arguments(signature, {"width": None}, "model", derived={"root"}) == []
    (misspelled,) = check_arguments(signature, {"roots": "x", "T_max": 1}, "model")
    assert (misspelled.where, misspelled.fix) == ("model.roots", "Did you mean 'root'?")
