"""An error told from the lines of the job's own code: those frames first, with their source, those of libraries counted.

All of it is text that is made where the error happens, since a traceback does not survive a journey between processes.
"""

from __future__ import annotations

import inspect
import linecache
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raymill.errors import RaymillError, RunError, WorkerError
from raymill.paths import ENGINE, project_root

LIBRARIES = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
INSTALLED = {"site-packages", "dist-packages"}
MOST_FRAMES = 12
MOST_ROW_IDS = 20


def is_own(file: str) -> bool:
    """Whether a source file is the job's own: not the engine's, Python's or an installed package's."""
    path = Path(file)
    if file.startswith("<") or INSTALLED & set(path.parts):
        return False
    resolved = path.resolve()
    return not resolved.is_relative_to(ENGINE) and not any(resolved.is_relative_to(library) for library in LIBRARIES)


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of the job's own code that an error came through, outermost first; of a syntax error, its line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_own(frame.filename)]
    if isinstance(error, SyntaxError) and error.filename and is_own(error.filename):
        frames.append(traceback.FrameSummary(error.filename, error.lineno, "<module>", line=error.text or ""))
    return frames


def culprit(error: BaseException) -> BaseException:
    """The error itself, or of those that it came from the nearest that came through the job's own code; else the error itself."""
    return next((one for one in _chain(error) if own_frames(one)), error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)


def place(file: str, line: int | None) -> str:
    """A line of a file, seen from the project's root where the file is below it: "jobs/mnist/task.py:21"."""
    path, root = Path(file).resolve(), project_root()
    shown = path.relative_to(root) if path.is_relative_to(root) else path
    return f"{shown}:{line}" if line else str(shown)


def place_of(frame: traceback.FrameSummary) -> str:
    """A frame in one line: place, function, source line."""
    return f"{place(frame.filename, frame.lineno)} in {frame.name}: {(frame.line or '').strip()}"


def definition(code: Any) -> str:
    """Where a function or class of the job is defined, with the source line; its name where that is not known or given."""
    if isinstance(code, str):
        return code
    code = inspect.unwrap(getattr(code, "func", code))
    try:
        file = inspect.getsourcefile(code)
        # Of a decorated function, the line of its first decorator.
        _, line = inspect.getsourcelines(code)
    except (TypeError, OSError):
        return getattr(code, "__qualname__", None) or repr(code)
    return f"{place(str(file), line)}: {linecache.getline(str(file), line).strip().rstrip(':')}"


def headline(error: BaseException) -> str:
    """The kind of an error and what it says."""
    said = str(error).strip()
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def tell(error: BaseException) -> str:
    """An error in lines: what it says, the frames of the job's own code with their source, how many others, its notes, and
    the same for the error of the job's own code that it came from, if there is one.
    """
    notes = list(getattr(error, "__notes__", ()))
    lines = [headline(error), *_frame_lines(error)]
    origin = culprit(error)
    if origin is not error:
        lines += [f"It came from {headline(origin)}", *_frame_lines(origin)]
        notes = [*getattr(origin, "__notes__", ()), *notes]
    return "\n".join([*lines, *dict.fromkeys(notes)])


def _frame_lines(error: BaseException) -> list[str]:
    own = own_frames(error)
    if not own:
        return []
    shown = own if len(own) <= MOST_FRAMES else [*own[: MOST_FRAMES // 2], *own[-MOST_FRAMES // 2 :]]
    lines = [text for frame in shown for text in _frame_text(frame)]
    inside = traceback.extract_tb(error.__traceback__)
    others = [frame for frame in inside if not is_own(frame.filename)]
    if others and inside[-1] is others[-1]:
        lines.append(f"  raised by {_library(inside[-1].filename)}, in {inside[-1].name}")
    if hidden := len(others) + len(own) - len(shown):
        whose = ", ".join(dict.fromkeys(_library(frame.filename) for frame in others)) or "its own"
        lines.append(f"  ({hidden} frames of {whose} left out)")
    return lines


def _frame_text(frame: traceback.FrameSummary) -> list[str]:
    return [f"  {place(frame.filename, frame.lineno)}, in {frame.name}", f"    {(frame.line or '').strip()}"]


def _library(file: str) -> str:
    path = Path(file)
    if path.resolve().is_relative_to(ENGINE):
        return "raymill"
    installed = [index for index, part in enumerate(path.parts) if part in INSTALLED]
    return path.parts[installed[-1] + 1] if installed and installed[-1] + 1 < len(path.parts) else "Python"


@contextmanager
def noting(note: Callable[[], str]) -> Iterator[None]:
    """Give every error that passes a note, such as the step and the rows that were worked on; a RunError says that itself."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        if (text := note()) not in getattr(error, "__notes__", ()):
            error.add_note(text)
        raise


def for_a_journey(error: Exception, who: str, rank: int | None = None) -> Exception:
    """An error as it can go to another process without loss: one of the job's own code as text, every other as it is.

    Args:
        who: which part of the run failed.
    """
    if isinstance(error, RaymillError) or not own_frames(culprit(error)):
        return error
    text = "".join(traceback.format_exception(error))
    return WorkerError(f"{who} failed: {tell(error)}", rank, text)


def row_ids(ids: Any) -> str:
    """Row ids in words, the first of many."""
    numbers = [int(number) for number in ids]
    shown = ", ".join(map(str, numbers[:MOST_ROW_IDS]))
    return shown if len(numbers) <= MOST_ROW_IDS else f"{shown} and {len(numbers) - MOST_ROW_IDS} more"


def describe(value: Any, depth: int = 0) -> str:
    """A batch or what came back in words: types and shapes, no values."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict) and depth < 2:
        return ", ".join(f"{name} {describe(inner, depth + 1)}" for name, inner in list(value.items())[:20]) or "nothing"
    if isinstance(value, list | tuple):
        first = f" of {describe(value[0], depth + 1)}" if value and depth < 2 else ""
        return f"{type(value).__name__} [{len(value)}]{first}"
    return "None" if value is None else f"a {type(value).__name__}"
