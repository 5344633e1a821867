"""A driver that stands by takes over when another one, or a worker of it, is killed: same rows, same weights, nothing left."""

from __future__ import annotations

import pytest

from faults.cases import BLOBS, Case, Play, arguments, both
from faults.harness import kill_once_another_stands_by, live, order_of, play
from faults.run_faults import reference
from raymill.record.events import StageReached, StandbyDecided, read_events

pytestmark = pytest.mark.integration

PAUSES = "step_done:delay:rank=0:step=12:seconds=240,step_done:delay:rank=0:step=24:seconds=240"
"""Training stands still until the driver that stands by is ready: what is killed then cannot finish first."""

JOB = (*BLOBS, "loop.stall_timeout_s=300", "retry.standby=true")


def test_who_stands_by_takes_over_from_a_killed_worker_and_then_from_a_killed_driver() -> None:
    provoke = both(kill_once_another_stands_by("worker", attempt=1), kill_once_another_stands_by("driver", attempt=2))
    with live() as place:
        case = Case(0, "standby", "", (Play(),), JOB, workers=2)
        result = play(place, arguments(case, case.plays[0], place), PAUSES, provoke)
        assert result.exit_code == 0, result.said
        assert place.folder is not None
        events, _ = read_events(place.folder.events)
        assert order_of(place.folder) == result.order
    assert result.provoked
    stages = [event.stage for event in events if isinstance(event, StageReached)]
    assert [stage for stage in stages if "Ray" in stage or "stood by" in stage] == [
        "starting Ray",
        "the driver that stood by takes over",
        "the driver that stood by takes over",
    ]
    assert sum(event.started for event in events if isinstance(event, StandbyDecided)) >= 2
    assert result.attempts == 3
    assert len(result.summary["recoveries"]) == 2
    undisturbed = reference(BLOBS, 2)
    assert (result.order, result.weights) == (undisturbed.order, undisturbed.weights)
    assert (result.broken, result.left, result.tracked) == ([], [], [])
