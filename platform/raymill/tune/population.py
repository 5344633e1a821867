"""Population-based training as trials of a study: which member goes on from whom, and with which values.

Jaderberg et al., "Population Based Training of Neural Networks", 2017, in generations: each trial is one member's training for
some evaluations. Behind each generation the worst members go on from what one of the best has learned, with that one's values
changed a little; the others go on with their own. All of it follows from the seed and what the generation before came to, so it
can be found again at any time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymill.config.search import ParameterSpec
from raymill.tune.space import Values

FACTORS = (0.8, 1.2)
"""What a number is multiplied by."""


@dataclass(frozen=True)
class Member:
    """What one member of a generation came to.

    Attributes:
        values: what it trained with.
        worth: more is better; -inf: its trial failed.
    """

    values: Values
    worth: float


def parent_of(member: int, before: Sequence[Member], quantile: float, seed: str) -> int:
    """Who of the generation before a member goes on from: itself, or for one of the worst, one of the best.

    Args:
        quantile: share of the population that is replaced, and that replaces it.
        seed: of the draw.
    """
    count = max(1, math.floor(quantile * len(before)))
    ranked = sorted(range(len(before)), key=lambda one: (-before[one].worth, one))
    best = [one for one in ranked[:count] if before[one].worth > -math.inf]
    is_worst = member in ranked[-count:] or before[member].worth == -math.inf
    return random.Random(seed).choice(best) if is_worst and best else member


def changed(values: Values, space: Mapping[str, ParameterSpec], seed: str) -> Values:
    """A parent's values, each changed a little inside its bounds: a number by a factor, a choice to a neighbour or not at all."""
    draw = random.Random(seed)
    return {name: _changed(value, space[name], draw) for name, value in values.items()}


def _changed(value: Any, one: ParameterSpec, draw: random.Random) -> Any:
    factor, step = draw.choice(FACTORS), draw.choice((-1, 0, 1))
    if one.values is not None:
        place = one.values.index(value) + step
        return one.values[min(max(place, 0), len(one.values) - 1)]
    assert one.low is not None
    assert one.high is not None
    moved = min(max(value * factor, one.low), one.high)
    if one.kind == "int":
        # A small number would stay where it is.
        moved = min(max(round(moved) if round(moved) != value else value + step, one.low), one.high)
    if one.step is not None:
        moved = one.low + round((moved - one.low) / one.step) * one.step
    return int(moved) if one.kind == "int" else min(moved, one.high)
