"""How much of a step is waiting for data, when ranks wait for each other too."""

from __future__ import annotations

import pytest

from raymill.parallel.clock import Clock, RankTime, held_up_s, share


@pytest.mark.parametrize(
    ("ranks", "expected_s"),
    [
        ([(3.0, 1.0)], 3.0),  # alone, its own wait
        ([(0.0, 1.0), (3.0, 1.0)], 3.0),  # the other one waits in the exchange
        ([(2.0, 1.0), (3.0, 1.0)], 3.0),  # the longest, not the sum
        ([(3.0, 0.0), (0.0, 5.0)], 0.0),  # hidden: the other rank would have come later anyway
        ([(3.0, 0.0), (0.0, 2.0)], 1.0),  # hidden in part
        ([(3.0, 2.0), (0.0, 2.0), (1.0, 1.0)], 3.0),
    ],
)
def test_a_step_is_held_up_by_as_much_as_its_last_rank_would_have_been_ready_sooner(
    ranks: list[tuple[float, float]], expected_s: float
) -> None:
    assert held_up_s([RankTime(*rank) for rank in ranks]) == pytest.approx(expected_s)


def test_the_time_of_training_is_that_between_meetings_without_evaluations() -> None:
    now = [100.0]
    clock = Clock(lambda: now[0])
    assert (clock.started, clock.training_s()) == (False, 0.0)
    now[0] = 110.0
    clock.start(position=60, waited_s=7.0)

    now[0] = 114.0
    assert clock.apart(waited_s=10.0) == RankTime(wait_s=3.0, busy_s=1.0)
    now[0] = 115.0
    clock.gather(waited_s=10.0)
    assert clock.training_s() == 5.0
    assert clock.rows_per_s(position=160) == 20.0

    now[0] = 118.0
    clock.evaluation_s += 3.0
    clock.gather(waited_s=12.0)
    assert clock.training_s() == 5.0
    now[0] = 119.0
    assert clock.apart(waited_s=12.0) == RankTime(wait_s=0.0, busy_s=1.0)
    assert clock.training_s() == 5.0, "what comes after the last step is no training"


def test_a_share_is_from_0_to_1_and_none_where_no_time_passed() -> None:
    assert [share(1.0, 4.0), share(5.0, 4.0), share(-1e-9, 4.0), share(0.0, 0.0)] == [0.25, 1.0, 0.0, 0.0]
