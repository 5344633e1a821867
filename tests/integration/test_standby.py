"""A driver that stands by takes over when another one, or a worker of it, is killed: same rows, same weights, nothing left."""

from __future__ import annotations

import pytest

from faults.cases import BLOBS, Case, Play, arguments, both
from faults.harness import Result, kill_once_another_stands_by, live, order_of, play
from raymill.record.events import StageReached, StandbyDecided, read_events

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PAUSES = "step_done:delay:rank=0:step=12:seconds=240,step_done:delay:rank=0:step=24:seconds=240"
"""Training stands still until the driver that stands by is ready: what is killed then cannot finish first."""

JOB = (*BLOBS, "loop.stall_timeout_s=300")


def run(*settings: str, fault: str = "", provoke: object = None) -> tuple[Result, list[str], list[StandbyDecided]]:
    with live() as place:
        case = Case(0, "standby", "", (Play(),), (*JOB, *settings), workers=2)
        result = play(place, arguments(case, case.plays[0], place), fault, provoke)  # type: ignore[arg-type]
        assert result.exit_code == 0, result.said
        assert place.folder is not None
        events, _ = read_events(place.folder.events)
        assert order_of(place.folder) == result.order
    stages = [event.stage for event in events if isinstance(event, StageReached)]
    return result, stages, [event for event in events if isinstance(event, StandbyDecided)]


def test_who_stands_by_takes_over_from_a_killed_worker_and_then_from_a_killed_driver() -> None:
    undisturbed, stages, decisions = run()
    assert stages.count("starting Ray") == 1
    # The run is over before a second driver would be worth it.
    assert not any(decision.started for decision in decisions)

    provoke = both(kill_once_another_stands_by("worker", attempt=1), kill_once_another_stands_by("driver", attempt=2))
    result, stages, decisions = run("retry.standby=true", fault=PAUSES, provoke=provoke)
    assert result.provoked
    assert [stage for stage in stages if "Ray" in stage or "stood by" in stage] == [
        "starting Ray",
        "the driver that stood by takes over",
        "the driver that stood by takes over",
    ]
    assert len([decision for decision in decisions if decision.started]) >= 2
    assert result.attempts == 3
    assert len(result.summary["recoveries"]) == 2
    assert (result.order, result.weights) == (undisturbed.order, undisturbed.weights)
    assert (result.broken, result.left, result.tracked) == ([], [], [])
