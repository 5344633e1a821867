"""What an attempt came to. Needs no torch: the driver reads it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one attempt on one rank; the same on every rank but for times.

    Attributes:
        status: whether all steps are done, or the training ended before on purpose.
        ended: why it ended before the job's last step; None: it did not.
        step: optimizer steps done since the job began.
        position: rows trained on since the job began.
        rows_used: the same, counted from what ranks really received, less what was skipped.
        rows_skipped: rows not trained on: bad ones, and those of batches that spoiled the numbers.
        metrics: of the last evaluation of each split.
        weights_sha256: of the weights at the end.
        rows_per_s: rows per second from the attempt's first step on, evaluations left out.
        data_wait_share: share of that time in which all ranks were held up by one that waited for rows.
        evaluation_wait_share: the same share of the time of evaluations.
    """

    status: Literal["finished", "interrupted"]
    step: int
    position: int
    rows_used: int
    rows_skipped: int
    metrics: dict[str, float]
    weights_sha256: str
    rows_per_s: float
    data_wait_share: float
    evaluation_wait_share: float
    ended: str | None = None
