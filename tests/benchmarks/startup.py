"""Seconds from the command to the end of the first optimizer step: raymill beside the guide's way, no cluster running.

Run it from the project's root:

    python tests/benchmarks/startup.py --data .raymill/data/mnist --out startup.json
"""

from __future__ import annotations

from measure import contest_arguments, contestants, enlarged, report, run_rounds


def main() -> None:
    """Run the contest and print its table."""
    parser = contest_arguments(__doc__ or "")
    parser.set_defaults(epochs=1, copies=5)
    options = parser.parse_args()
    with enlarged(options.data, options.copies) as data:
        commands = contestants(options, data)
        rounds = run_rounds({name: commands[name] for name in ("raymill", "guide", "in memory")}, options.repeats)
    report(rounds, "seconds_to_first_step", "guide", options.out)


if __name__ == "__main__":
    main()
