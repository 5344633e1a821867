"""How large a row becomes by the transform: pictures come as files, and leave as numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

import numpy as np

from raymill.data import seeds
from raymill.data.arrow import rows_bytes
from raymill.data.bad_rows import read_good_rows
from raymill.data.order import key
from raymill.data.reader import transformed
from raymill.data.rows import num_rows, take
from raymill.data.seeds import seed_everything, unchanged_generators
from raymill.task import TRAIN, Fragment, Pipeline

FEW_ROWS = 8


def transformed_row_bytes(pipeline: Pipeline, fragments: Sequence[Fragment], seed: int, *, lenient: bool) -> int | None:
    """Bytes of a row before or behind the transform, whichever is more: the mean of a few of the first training rows.

    Args:
        fragments: of the training rows.
        seed: of the job; the transform draws as in its first window.
        lenient: leave bad rows out, rather than give up.

    Returns:
        None where that cannot be told: what is wrong with the rows or the transform is for others to say.
    """
    # What the job's code prints is not the result of the command.
    with unchanged_generators(), redirect_stdout(sys.stderr):
        try:
            rows, _ = read_good_rows(pipeline, TRAIN, fragments[0], lenient=lenient)
            few = take(rows, slice(0, FEW_ROWS))
            before = rows_bytes(few)
            numbers = (seed, 0, 0, seeds.TRANSFORM)
            seed_everything(*numbers)
            behind = rows_bytes(
                transformed(pipeline.transform, few, TRAIN, np.random.Generator(np.random.Philox(key=key(*numbers))))
            )
            return max(before, behind) // num_rows(few)
        except Exception:
            return None
