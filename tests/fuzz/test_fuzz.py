"""Anything that a disk, a wire or a user may hand the engine: what is read is what was written, or it is refused in words.

Few and fixed cases here. `make fuzz` goes on for an hour (RAYMILL_FUZZ_S seconds) with random ones and prints the seed of each
round; RAYMILL_FUZZ_SEED repeats one.
"""

from __future__ import annotations

import faulthandler
import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS

FUZZ_S = float(os.environ.get("RAYMILL_FUZZ_S", "0"))
FUZZ_SEED = os.environ.get("RAYMILL_FUZZ_SEED")

FEW, MANY = 25, 400
HANG_S = 120.0
MOST_MEMORY_BYTES = 6 * 2**30


def rounds(target: str) -> Iterator[int | None]:
    """The seed of each round; None for the fixed cases."""
    if FUZZ_SEED:
        yield int(FUZZ_SEED)
    elif not FUZZ_S:
        yield None
    else:
        end_s = time.monotonic() + FUZZ_S / len(TARGETS)
        while time.monotonic() < end_s:
            number = random.SystemRandom().getrandbits(32)
            # Printed before, so that a round that ends the process can be repeated.
            print(f"{target}: RAYMILL_FUZZ_SEED={number}", flush=True)
            yield number


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_read_is_what_was_written_or_is_refused(name: str, tmp_path: Path) -> None:
    for number in rounds(name):
        fixed = number is None
        allowed = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

        @settings(
            max_examples=FEW if fixed else MANY, derandomize=fixed, database=None, deadline=None, suppress_health_check=allowed
        )
        @given(data=st.data())
        def check(data: st.DataObject) -> None:
            # A hang in C cannot be interrupted: the process ends, and the stacks say where.
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            try:
                TARGETS[name](data.draw, tmp_path)
            finally:
                faulthandler.cancel_dump_traceback_later()

        (check if fixed else seed(number)(check))()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MOST_MEMORY_BYTES
