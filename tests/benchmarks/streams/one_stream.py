"""One way of streaming, in a process of its own: writes its files, or streams them for a while and prints a JSON object.

python tests/benchmarks/streams/one_stream.py WAY KIND FOLDER [--write | --workers N --seconds S]
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import rows
import torch


def main() -> None:
    """Write, or stream."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way")
    parser.add_argument("kind", choices=sorted(rows.NUM_ROWS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=8.0, help="from the first batch on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    way = importlib.import_module(f"by_{options.way}")
    if options.write:
        way.write(options.kind, options.folder)
        return
    print(json.dumps(measured(way.batches(options.kind, options.folder, options.workers), options.kind, options.seconds)))


def measured(batches: Iterator[rows.Batch], kind: str, seconds: float) -> dict[str, object]:
    """Rows per second and CPU seconds per million rows, from the first batch on.

    Raises:
        SystemExit: a row of the first epoch did not come, or twice.
    """
    seen = torch.zeros(rows.NUM_ROWS[kind], dtype=torch.int64)
    num_seen = first = 0
    for batch in batches:
        numbers = rows.numbers_of(kind, batch)
        num_seen += len(numbers)
        if num_seen <= len(seen):
            seen[numbers] += 1
            if num_seen == len(seen) and not bool((seen == 1).all()):
                raise SystemExit(f"{int((seen != 1).sum())} rows did not come once in the first epoch")
        if not first:
            first, begun_s, cpu_s = num_seen, time.perf_counter(), cpu_of_all()
        elif (taken_s := time.perf_counter() - begun_s) > seconds:
            break
    count = num_seen - first
    used = cpu_of_all() - cpu_s
    return {"rows_per_s": round(count / taken_s, 1), "cpu_s_per_million_rows": round(used / count * 1e6, 1), "rows": count}


def cpu_of_all() -> float:
    """CPU seconds of this process and all that it started so far, those that are gone too."""
    this = psutil.Process()
    total = 0.0
    for process in [this, *this.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


if __name__ == "__main__":
    main()
