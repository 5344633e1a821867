"""Rules of the house that no other tool checks: names, sizes, and who may import or call what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
ENGINE = PROJECT / "platform" / "raymill"
CODE_FOLDERS = (ENGINE, PROJECT / "pipelines", PROJECT / "jobs")
FILES = sorted(path for folder in CODE_FOLDERS for path in folder.rglob("*.py"))

MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_FUNCTION = 60
VAGUE_NAMES = re.compile(r"(^|_)(utils?|helpers?|managers?|common|misc)(_|$)")

# Package -> the engine's files that may import it. Packages with one name are held to their rooms by import-linter.
ROOMS = {
    "ray.data": {"data/ray_stream.py"},
    "ray.train": {"orchestration/on_ray/ray_trainer.py", "orchestration/on_ray/worker.py", "ray_internals.py"},
    "ray.tune": {"tune/ray_tune.py", "tune/searcher.py"},
}

MOST_FILES_OF_A_ROOM = 13

# What a name of Ray looks like that Ray does not promise to keep.
PRIVATE_RAY = re.compile(r"\bray\._|\bray\.[a-z_.]*\._|\bRAY_[A-Z]*preload|_temp_dir\b|\b_node_ip_address\b|\b_raylet\b")

# Each of these can run code that is hidden in a file.
FORBIDDEN_CALLS = {
    "torch.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pandas.read_pickle",
    "eval",
    "exec",
}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}

# Modules without which `raymill check` cannot answer.
LIGHT = (
    "errors",
    "paths",
    "task",
    "config.load",
    "config.plan",
    "config.spec",
    "data.order",
    "data.sources",
    "orchestration.prepare",
)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)


def name_of(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


class WithoutTypes(ast.NodeTransformer):
    """Leaves out what only a type checker imports."""

    def visit_If(self, node: ast.If) -> ast.If | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def running_tree_of(path: Path) -> ast.Module:
    tree = WithoutTypes().visit(tree_of(path))
    assert isinstance(tree, ast.Module)
    return tree


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imports_of(tree: ast.Module) -> dict[str, str]:
    """Local name -> what it stands for, with its full dotted name, wherever in the file it is imported."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted_uses_of(tree: ast.Module) -> set[str]:
    """Full names of all that the file imports or reaches through an import, such as "torch.load"."""
    imported = imports_of(tree)
    uses = set(imported.values())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.Name):
            continue
        first, *rest = ast.unparse(node).split(".")
        uses.add(".".join([imported.get(first, first), *rest]))
    return uses


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


# ---------------------------------------------------------------- the folder named platform


def test_platform_is_no_package_so_the_standard_library_keeps_its_name() -> None:
    assert not (PROJECT / "platform" / "__init__.py").exists()
    done = run_python("-c", "import platform; print(platform.system()); print(platform.__file__)")
    assert done.returncode == 0, done.stderr
    assert str(PROJECT / "platform") not in done.stdout


def test_the_command_answers_from_the_project_root() -> None:
    done = run_python("-m", "raymill", "--help")
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


# ---------------------------------------------------------------- names and sizes


def test_there_is_code_to_check() -> None:
    assert len(FILES) > 10


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_and_its_functions_keep_their_budget(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    too_long = {
        function.name: lines
        for function in functions_of(tree_of(path))
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    }
    assert too_long == {}


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [name_of(path) for path in FILES if VAGUE_NAMES.search(path.stem)] == []


@pytest.mark.parametrize("path", sorted(ENGINE.rglob("*.py")), ids=name_of)
def test_every_public_name_of_the_engine_says_what_it_is(path: Path) -> None:
    tree = tree_of(path)
    public: list[ast.AST] = [tree]
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            public.append(node)
    bare = [getattr(node, "name", "the file") for node in public if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert bare == []


# ---------------------------------------------------------------- imports and calls


@pytest.mark.parametrize("package", ROOMS)
def test_ray_libraries_stay_in_their_rooms(package: str) -> None:
    users = {path for path in FILES if any(is_within(use, package) for use in dotted_uses_of(running_tree_of(path)))}
    allowed = {ENGINE / name for name in ROOMS[package]}
    assert sorted(map(name_of, users - allowed)) == []


def test_private_names_of_ray_stand_in_one_file() -> None:
    users = {name_of(path) for path in FILES if PRIVATE_RAY.search(code_of(path))}
    assert users == {"platform/raymill/ray_internals.py"}


def code_of(path: Path) -> str:
    """The file without docstrings and comments."""
    tree = running_tree_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_reads_what_could_run_code(path: Path) -> None:
    tree = tree_of(path)
    imported = {name for name in imports_of(tree).values() if name.split(".")[0] in FORBIDDEN_IMPORTS}
    assert (dotted_uses_of(tree) & FORBIDDEN_CALLS) | imported == set()
    flags = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "allow_pickle"]
    assert [ast.unparse(flag) for flag in flags if ast.unparse(flag.value) != "False"] == []


def test_checking_a_job_loads_none_of_the_heavy_libraries() -> None:
    modules = ", ".join(f"raymill.{name}" for name in LIGHT)
    done = run_python("-c", f"import {modules}, sys; print(sorted({{'torch', 'ray', 'mlflow'}} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- what the documents say


DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md")), *sorted(PROJECT.glob("*/README.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_of_a_document_leads_to_a_file(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_every_test_that_readme_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (PROJECT / "README.md").read_text()))
    there = {function.name for path in (PROJECT / "tests").rglob("test_*.py") for function in functions_of(tree_of(path))}
    assert len(named) > 8
    assert named - there == set()


def test_each_sentence_of_the_promise_has_a_link_to_its_proof() -> None:
    promise = (PROJECT / "README.md").read_text().partition("## The promise")[2].partition("\n## ")[0]
    rows = [line for line in promise.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    assert [row for row in rows if "](tests/" not in row] == []


def test_readme_shows_the_tree_as_it_is() -> None:
    shown = set(re.findall(r"^    (\w+)/", (PROJECT / "README.md").read_text(), re.MULTILINE))
    there = {path.name for path in PROJECT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert shown == there - {"build", "dist"}


ROOM_NAMES = sorted(str(path.parent.relative_to(ENGINE)) for path in ENGINE.rglob("*/__init__.py"))


def test_the_architecture_says_of_each_file_of_the_engine_what_it_owns() -> None:
    table = re.findall(r"^\| (`[^|]+) \|", (PROJECT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    named = set(re.findall(r"`([\w./]+)`", " ".join(table)))
    there = {str(path.relative_to(ENGINE).with_suffix("")) for path in ENGINE.rglob("*.py") if path.stem != "__init__"}
    assert named == there - {"__main__"}


@pytest.mark.parametrize("room", ROOM_NAMES)
def test_each_room_says_what_belongs_there_and_what_does_not_and_is_small(room: str) -> None:
    said = ast.get_docstring(tree_of(ENGINE / room / "__init__.py")) or ""
    assert "Here: " in said
    assert "Not here: " in said
    assert len(list((ENGINE / room).glob("*.py"))) <= MOST_FILES_OF_A_ROOM
