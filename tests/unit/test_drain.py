"""Whether there is room for a run on the machines that stay."""

from __future__ import annotations

from raymill.orchestration.on_ray.drain import room

NODES = {"a": {"CPU": 4.0}, "b": {"CPU": 2.5, "GPU": 1.0}, "c": {"memory": 1.0}}


def test_workers_fit_by_node_and_not_in_the_sum_of_what_is_left_over() -> None:
    assert room(NODES, [], {"CPU": 1.5}) == 2 + 1


def test_a_node_that_leaves_has_no_room() -> None:
    assert room(NODES, ["a"], {"CPU": 1.0}) == 2
    assert room(NODES, ["a", "b"], {"CPU": 1.0}) == 0


def test_every_resource_of_a_worker_must_be_there() -> None:
    assert room(NODES, [], {"CPU": 1.0, "GPU": 0.5}) == 2
