"""What safety costs: a checkpoint every 50 steps, and strict mode.

Run it from the project's root:

    python tests/benchmarks/overhead.py --data .raymill/data/mnist --out overhead.json

A checkpoint costs less than two runs of the same command differ by. So one run saves every 100 steps, and the 50 steps around
each save are compared with the 50 steps after them, which have none to share the machine with: A B A B within a run.
Strict mode is compared run by run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from measure import contest_arguments, contestants, enlarged, environment, report, run_once, run_rounds
from raymill.record.events import Event, StepDone, read_events

STEPS = 50


def main() -> None:
    """Print what both cost."""
    parser = contest_arguments(__doc__ or "")
    parser.set_defaults(epochs=6)
    parser.add_argument("--only", choices=("checkpoints", "strict"), help="leave out the other")
    options = parser.parse_args()
    with enlarged(options.data, options.copies) as data:
        plain = contestants(options, data)["raymill"]
        if options.only != "strict":
            print_checkpoints(plain, options)
        if options.only != "checkpoints":
            plain = [*plain, "--set", "loop.epochs=1"]
            rounds = run_rounds({"plain": plain, "strict": [*plain, "--set", "loop.strict=true"]}, options.repeats)
            report(rounds, "rows_per_s", "plain", options.out)


def print_checkpoints(plain: Sequence[str], options: argparse.Namespace) -> None:
    """Train with a checkpoint every 100 steps, and print what one costs 50 steps."""
    shares = []
    with environment() as variables:
        for number in range(options.repeats):
            done = run_once("raymill", [*plain, "--set", f"checkpoint.every_steps={2 * STEPS}"], variables)
            found = pairs(read_events(Path(done["folder"]) / "events.jsonl")[0])
            shares += [with_save_s / without_s - 1 for with_save_s, without_s in found]
            print(f"run {number + 1}: {len(found)} pairs, {median_of(shares)} so far", flush=True)
    print(f"a checkpoint every {STEPS} steps costs {median_of(shares)} of the time\n")


def median_of(shares: Sequence[float]) -> str:
    """The median share and half the width of its 95 % interval (1.25 standard errors of a mean, times 1.96)."""
    spread = statistics.stdev(shares) / len(shares) ** 0.5 * 1.25 * 1.96
    return f"{statistics.median(shares):+.2%} (+-{spread:.2%})"


def pairs(events: Sequence[Event]) -> list[tuple[float, float]]:
    """Seconds of 50 steps with a checkpoint, and of the 50 after them without one.

    A step is reported during the next one, but before a checkpoint at once: so a stretch begins and ends one step before
    the checkpoint's. Those around an evaluation are left out: it takes time of its own.
    """
    steps = [event for event in events if isinstance(event, StepDone)]
    ends_s = {event.step: event.time_s for event in steps}
    epochs = {event.step: event.epoch for event in steps}
    found = []
    for start in range(2 * STEPS - 1, max(ends_s) - 2 * STEPS, 2 * STEPS):
        middle, end = start + STEPS, start + 2 * STEPS
        if epochs[start] == epochs[end]:
            found.append((ends_s[middle] - ends_s[start], ends_s[end] - ends_s[middle]))
    return found


if __name__ == "__main__":
    main()
