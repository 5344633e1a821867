"""What safety costs: rows per second with a checkpoint every 50 steps, and in strict mode, beside the plain run.

Run it from the project's root:

    python tests/benchmarks/overhead.py --data .raymill/data/mnist --out overhead.json
"""

from __future__ import annotations

from measure import contest_arguments, contestants, enlarged, report, run_rounds


def main() -> None:
    """Run the contest and print its table."""
    parser = contest_arguments(__doc__ or "")
    parser.set_defaults(epochs=1)
    options = parser.parse_args()
    with enlarged(options.data, options.copies) as data:
        plain = contestants(options, data)["raymill"]
        commands = {
            "plain": plain,
            "checkpoint every 50 steps": [*plain, "--set", "checkpoint.every_steps=50"],
            "strict": [*plain, "--set", "loop.strict=true"],
        }
        rounds = run_rounds(commands, options.repeats)
    report(rounds, "rows_per_s", "plain", options.out)


if __name__ == "__main__":
    main()
