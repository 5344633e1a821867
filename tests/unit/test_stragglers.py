"""A rank that is slower than the others is named once, and chance names nobody."""

from __future__ import annotations

from raymill.training.stragglers import WINDOW_STEPS, Straggler, StragglerDetector, slowest_rank


def test_a_slow_rank_is_named_with_its_factor_and_what_it_costs() -> None:
    assert slowest_rank([[0.10, 0.45, 0.15]] * 5) == Straggler(rank=1, factor=0.45 / 0.125, lost_s=0.325)


def test_ranks_that_differ_by_less_than_twice_or_by_next_to_nothing_are_not_named() -> None:
    assert slowest_rank([[0.10, 0.19]]) is None
    assert slowest_rank([[0.001, 0.015]]) is None


def test_one_rank_alone_is_never_slow() -> None:
    assert slowest_rank([[5.0]] * 20) is None


def test_a_pause_of_a_few_steps_is_no_slowness() -> None:
    assert slowest_rank([[0.1, 0.1]] * 6 + [[0.1, 9.0]] * 4) is None


def test_a_rank_is_named_once_after_enough_steps() -> None:
    detector = StragglerDetector()
    found = [detector.add([0.1, 0.4]) for _ in range(3 * WINDOW_STEPS)]
    assert [number for number, slow in enumerate(found, 1) if slow] == [WINDOW_STEPS]


def test_another_rank_that_becomes_slow_later_is_named_too() -> None:
    detector = StragglerDetector()
    found = [detector.add(times) for times in [[0.1, 0.4]] * WINDOW_STEPS + [[0.9, 0.1]] * WINDOW_STEPS]
    assert [slow.rank for slow in found if slow] == [1, 0]
