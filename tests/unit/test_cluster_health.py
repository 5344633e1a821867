"""What of the nodes of a cluster is said to do harm."""

from __future__ import annotations

from typing import Any

import pytest

from raymill.cluster.health import _skew_s, differences, look


def node(name: str, **more: Any) -> dict[str, Any]:
    fit = {"versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "pyarrow": "25.0.0", "numpy": "2.4.0"}}
    fit |= {"disk_free_gb": 50.0, "shared_memory_free_gb": 8.0, "gpus": [], "gpus_compute": True, "nccl": True}  # type: ignore[dict-item]
    return {"name": name, "num_gpus": 0.0, "skew_s": 0.0, "bandwidth_mb_s": 900.0, **fit, **more}


def test_nodes_that_are_alike_differ_in_nothing() -> None:
    assert differences([node("a"), node("b"), node("c", bandwidth_mb_s=400.0)]) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"failed": "does not answer: gone"}, "x: does not answer: gone; look at its log"),
        ({"versions": {**node("a")["versions"], "torch": "2.14.0"}}, "torch: a has 2.13.0, b has 2.13.0, x has 2.14.0; install"),
        ({"skew_s": -3.2}, "x: its clock is -3.2 s from the head's"),
        ({"disk_free_gb": 1.0}, "x: 1 GB of disk are free"),
        ({"shared_memory_free_gb": 0.06}, "--shm-size"),
        ({"num_gpus": 2.0, "gpus": ["H200"]}, "torch sees 1 GPUs, Ray offers 2"),
        ({"gpus": ["H200"], "gpus_compute": False}, "computes wrongly"),
        ({"gpus": ["H200"], "nccl": False}, "no NCCL"),
        ({"bandwidth_mb_s": 20.0}, "20 MB/s come to it, usual are 900"),
    ],
)
def test_what_does_harm_is_named_with_what_to_do(more: dict[str, Any], said: str) -> None:
    [line] = differences([node("a"), node("b"), node("x", **more)])
    assert said in line


def test_this_machine_can_be_looked_at() -> None:
    found = look()
    assert differences([{**node("here"), **found, "disk_free_gb": 50.0, "shared_memory_free_gb": 8.0}]) == []


def test_a_clock_is_told_by_the_question_that_was_answered_soonest(monkeypatch: pytest.MonkeyPatch) -> None:
    # Asked, answered, ...: five rounds of which the third is quick; the other clock is 5 s ahead.
    times = iter([0.0, 4.0, 10.0, 13.0, 20.0, 20.1, 30.0, 33.0, 40.0, 44.0])
    told = iter([8.9, 17.9, 25.05, 37.9, 48.9])
    monkeypatch.setattr("raymill.cluster.health.time.time", lambda: next(times))
    assert _skew_s(lambda: next(told)) == 5.0
