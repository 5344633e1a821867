"""What a source's `make` returns, kept for as long as the process lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any

from raymill.data.seeds import MAKE, seed_everything, unchanged_generators
from raymill.errors import InputError, Problem

# ---------------------------------------------------------------- once per process


def made_once(make: Callable[[], Any]) -> Any:
    """What `make` returns, kept: equal functions with equal arguments are called once per process."""
    if not isinstance(make, partial):
        return _call(make, (), ())
    # A partial that went through pickle is another object; its parts are equal.
    arguments = (make.args, tuple(sorted(make.keywords.items())))
    try:
        hash(arguments)
    except TypeError as error:
        fix = "Use numbers, strings and tuples, and make the rest inside the function."
        raise InputError([Problem("make", f"arguments {arguments}", "arguments that can be compared", fix)]) from error
    return _call(make.func, *arguments)


@lru_cache(maxsize=8)
def _call(function: Callable[..., Any], args: tuple[Any, ...], keywords: tuple[tuple[str, Hashable], ...]) -> Any:
    # The same in every process, and whichever read came first has its random numbers to itself.
    with unchanged_generators():
        seed_everything(MAKE)
        return function(*args, **dict(keywords))
