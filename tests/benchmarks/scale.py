"""The real planner, order, events and line at sizes that no machine here has: seconds and memory of each.

    python tests/benchmarks/scale.py [--workers 10 100 1000 10000] [--rows 1000000000000]

Nothing is trained and no row is read. What is measured is what raymill itself computes for such a run: the plan, where the stream
stands in the middle of the last epoch (what a resume begins with), the rows of one window and how workers share a batch, the
events of 10,000 steps, and a second's decision about a line of as many submitted runs as there are workers. docs/scale.md says
what it means.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS_OF_FRAGMENT = 1_000_000
"""A Parquet row group of small rows, some hundred MB."""

EPOCHS, STEPS = 3, 10_000


def main() -> None:
    """Print one line per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[10, 100, 1000, 10_000])
    parser.add_argument("--rows", type=int, default=10**12)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.rows)))
        return
    for workers in options.workers:
        # A process each: memory is its highest.
        command = [sys.executable, __file__, "--one", str(workers), "--rows", str(options.rows)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print("  ".join(f"{name} {value}" for name, value in found.items()), flush=True)


def timed(into: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """What some work returns; its milliseconds are noted."""
    began = time.perf_counter()
    result = work()
    into[f"{name}_ms"] = round(1000 * (time.perf_counter() - began), 1)
    return result


def measure(workers: int, rows: int) -> dict[str, Any]:
    """All of it for a run of so many workers."""
    from raymill.config.plan import ClusterFacts, batch_shardings, job_order, make_plan
    from raymill.config.spec import JobSpec
    from raymill.data.manifest import Manifest, SplitManifest, as_record
    from raymill.data.order import Stream, window, window_rows
    from raymill.task import TRAIN, Fragment

    found: dict[str, Any] = {"workers": workers}
    fragments = tuple(
        Fragment(f"part-{number // 100}.parquet", number % 100, ROWS_OF_FRAGMENT, 100 * ROWS_OF_FRAGMENT, "-")
        for number in range(rows // ROWS_OF_FRAGMENT)
    )
    manifest = Manifest({TRAIN: SplitManifest(fragments)})
    found["fragments"] = len(fragments)
    spec = JobSpec.model_validate(
        {
            "name": "large",
            "task": "-",
            "pipeline": "-",
            "optimizer": {"kind": "SGD", "lr": 0.1},
            "loop": {"epochs": EPOCHS, "global_batch_rows": 256 * workers},
            "scale": {"workers": workers, "cpus_per_worker": 8.0},
            "checkpoint": {"every_steps": 1000},
        }
    )
    facts = ClusterFacts(num_cpus=10.0 * workers, num_gpus=0, memory_bytes=2**38, is_shared=True)
    plan = timed(found, "plan", lambda: make_plan(spec, manifest, facts))
    text = timed(found, "manifest_as_text", lambda: json.dumps(as_record(manifest)))
    found["manifest_mb"] = round(len(text) / 1e6, 1)
    order = timed(found, "order", lambda: job_order(spec, plan, manifest))
    stream = timed(found, "stream", lambda: Stream(order, 0))
    middle = (EPOCHS - 1) * rows + rows // 2
    item = timed(found, "item_in_the_middle", lambda: Stream(order, middle)[0])
    one = window(order.train, item.epoch, item.window)
    timed(found, "rows_of_a_window", lambda: window_rows(order.train, item.epoch, one.fragments))
    found["windows"] = len(stream)
    timed(found, "shares_of_a_batch", lambda: batch_shardings(plan, order, workers))
    measure_events(found)
    measure_line(found, workers)
    found["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return found


def measure_events(found: dict[str, Any]) -> None:
    """The events of many steps, as one process of a run writes them and another one follows."""
    from raymill.record.events import EventWriter, StepDone, read_events

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "events.jsonl")

        def write() -> None:
            with EventWriter(path) as writer:
                for step in range(STEPS):
                    writer.write(
                        StepDone(step=step, epoch=0, rows=step, metrics={"loss": 1.0}, rows_per_s=1.0, data_wait_share=0.0)
                    )

        timed(found, "events_of_10000_steps", write)
        timed(found, "read_again", lambda: read_events(path))
        found["events_mb"] = round(path.stat().st_size / 1e6, 1)


def measure_line(found: dict[str, Any], count: int) -> None:
    """A decision about so many submitted runs, half of which run."""
    from raymill.cluster.decisions import decide
    from raymill.cluster.line import ATTEMPT, Asked, Job, read

    jobs = []
    for number in range(count):
        name = f"run-{number}"
        asked = Asked(run=name, job="job", user=f"user-{number % 20}", command=("train", "job"), priority=number % 3, most=2)
        jobs.append(Job(name, asked.as_metadata(), "SUCCEEDED", 0, number))
        if number % 2:
            told = {"raymill": ATTEMPT, "of": name, "number": "1", "workers": "1", "is_ahead": "no"}
            jobs.append(Job(f"{name}-try-1", told, "RUNNING", None, number))
    decided = timed(found, "decide_about_as_many_runs", lambda: decide(read(jobs), count // 2 + 8, 0))
    found["acts"] = len(decided)


if __name__ == "__main__":
    main()
