"""Rows per second of training: raymill beside the guide's way, torchrun with a DataLoader, and data in memory.

Run it from the project's root:

    python tests/benchmarks/throughput.py --data .raymill/data/mnist --out throughput.json
"""

from __future__ import annotations

from measure import contest_arguments, contestants, enlarged, report, run_rounds


def main() -> None:
    """Run the contest and print its table."""
    options = contest_arguments(__doc__ or "").parse_args()
    with enlarged(options.data, options.copies) as data:
        rounds = run_rounds(contestants(options, data), options.repeats)
    report(rounds, "rows_per_s", "raymill", options.out)


if __name__ == "__main__":
    main()
