"""Whether a model can be exported: its graph, without the job's code, for batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import nn

from raymill.own_code.traces import culprit, headline, own_frames, place_of

MOST_LETTERS = 400
"""Of a reason; torch adds pages of what it knows."""


def why_not(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> str:
    """Why a model cannot be exported, in words; "" where it can, and the graph computes the same.

    Args:
        model: in eval mode.
        inputs: an example for `forward`, of two rows or more.
    """
    any_size = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    try:
        with without_pages():
            # As MLflow does it when the model is registered.
            exported = torch.export.export(model, inputs, dynamic_shapes=any_size).module()
        return difference(model, exported, inputs)
    except Exception as error:  # it runs the job's own code and may raise anything
        return reason(error)


@contextmanager
def without_pages() -> Iterator[None]:
    """Within this, nothing is shown of what torch prints of a graph that it could not finish."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


def difference(model: nn.Module, exported: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> str:
    """How the outputs differ, for the example and for a batch of another size; "" when they do not."""
    for batch in (inputs, tuple(torch.cat([value, value]) for value in inputs)):
        with torch.no_grad():
            expected, got = model(*batch), exported(*batch)
        try:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        except AssertionError as error:
            return f"exported, it computes something else: {_short(str(error))}"
    return ""


def reason(error: BaseException) -> str:
    """An error of `torch.export` in one line, with the line of the job's own code that it came through."""
    frames = own_frames(culprit(error))
    return _short(headline(error)) + (f" ({place_of(frames[-1])})" if frames else "")


def _short(text: str) -> str:
    said = " ".join(text.split())
    return said if len(said) <= MOST_LETTERS else f"{said[:MOST_LETTERS]}..."
