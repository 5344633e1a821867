"""What is fitted once on the training rows: words, a scale, the list of classes; as bytes that the job's own code reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from raymill.data import seeds
from raymill.data.bad_rows import read_good_rows
from raymill.data.rows import num_rows
from raymill.data.seeds import seed_everything, unchanged_generators
from raymill.own_code.seams import FIT, calling, wrong
from raymill.own_code.traces import describe
from raymill.task import TRAIN, Fragment, Pipeline, Rows

MAX_BYTES = 64 * 2**20
"""Of all artefacts of a job: they travel to each process that reads or trains."""


def fit(pipeline: Pipeline, fragments: Sequence[Fragment], seed: int, *, lenient: bool) -> dict[str, bytes]:
    """Call the pipeline's `fit` with its training rows, fragment by fragment; nothing where it has none.

    Args:
        fragments: of the training rows.
        seed: of the job; reading draws as in the first epoch.
        lenient: leave bad rows out, rather than raise.

    Raises:
        InputError: what `fit` returned is not bytes by name, or too many.
        DataError: rows cannot be read.
    """
    if pipeline.fit is None:
        return {}
    with calling(FIT), unchanged_generators():
        fitted = pipeline.fit(_training_rows(pipeline, fragments, seed, lenient))
    if not isinstance(fitted, Mapping) or not all(
        isinstance(name, str) and isinstance(data, bytes) for name, data in fitted.items()
    ):
        raise wrong(FIT, pipeline.fit, describe(fitted))
    if not fitted:
        fix = "Return what was fitted, as bytes by name; or leave `fit` out of the pipeline."
        raise wrong(FIT, pipeline.fit, "nothing, by no name", fix)
    if (size := sum(map(len, fitted.values()))) > MAX_BYTES:
        fix = "Keep less: what is larger is data, for a source of its own."
        raise wrong(FIT, pipeline.fit, f"{size} bytes in all, and at most {MAX_BYTES} are kept", fix)
    return dict(fitted)


def _training_rows(pipeline: Pipeline, fragments: Sequence[Fragment], seed: int, lenient: bool) -> Iterator[Rows]:
    for number, fragment in enumerate(fragments):
        seed_everything(seed, 0, number, seeds.READ)
        with seeds.reading(seed, 0):
            rows, _ = read_good_rows(pipeline, TRAIN, fragment, lenient=lenient)
        if num_rows(rows):
            yield rows
