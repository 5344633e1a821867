"""Rows per second, CPU and memory of streams: raymill's beside those of other projects, each in a process of its own, in turn.

    python tests/benchmarks/streams/contest.py --peers .venv-peers/bin/python --out streams.json

One process takes the batches and does nothing with them. Each way is tried with every number of workers that the machine has CPUs
for, and the table has its best. Memory is what a way's processes hold together, without files that are mapped; every 0.2 s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
WAYS = {
    **dict.fromkeys(("raymill", "loader", "datasets", "ray_data"), "own"),
    **dict.fromkeys(("webdataset", "mosaic", "litdata"), "peers"),
}
"""In which environment each one is."""

KINDS = ("raw", "jpeg", "tokens", "tabular")
LIMIT_S = 300.0


def main() -> None:
    """Run the contest and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, required=True, help="the Python that has the other projects' packages")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--workers", nargs="+", type=int, default=list(range(psutil.cpu_count() + 1)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each stream")
    parser.add_argument("--out", type=Path, help="file for every figure, as JSON")
    options = parser.parse_args()
    pythons = {"own": Path(sys.executable), "peers": options.peers.absolute()}
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory(prefix="rb-") as home:
        for kind in options.kinds:
            folders = {way: Path(home, kind, way) for way in options.ways}
            for way, folder in folders.items():
                folder.mkdir(parents=True)
                command(pythons[WAYS[way]], way, kind, folder, home, "--write")
            found = results[kind] = {}
            for turn in range(options.repeats):
                for way, folder in folders.items():
                    for workers in options.workers:
                        if way == "ray_data" and not workers:
                            continue
                        given = f"--workers={workers}", f"--seconds={options.seconds}"
                        result = command(pythons[WAYS[way]], way, kind, folder, home, *given)
                        found.setdefault(f"{way} {workers}", []).append(result)
                        print(
                            f"round {turn + 1}/{options.repeats}  {kind:8} {way:11} {workers} {result}",
                            file=sys.stderr,
                            flush=True,
                        )
            print(table(kind, found), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")


def command(python: Path, way: str, kind: str, folder: Path, home: str, *given: str) -> dict[str, Any]:
    """Run one way; its JSON object, with the memory that it took.

    Raises:
        SystemExit: it failed, or did not end.
    """
    words = [str(python), str(HERE / "one_stream.py"), way, kind, str(folder), *given]
    quiet = {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": home, "RAY_USAGE_STATS_ENABLED": "0", "HF_HOME": home, "RAYMILL_HOME": home}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = psutil.Popen(words, stdout=out, stderr=err, env={**os.environ, **quiet}, start_new_session=True)
        peak_bytes, waited = 0, 0.0
        while process.poll() is None:
            peak_bytes, waited = max(peak_bytes, held_bytes(process)), waited + 0.2
            if waited > LIMIT_S:
                for one in [process, *process.children(recursive=True)]:
                    one.kill()
            try:
                process.wait(0.2)
            except psutil.TimeoutExpired:
                continue
        out.seek(0), err.seek(0)
        if process.returncode:
            raise SystemExit(f"{way} {kind} {given} ended with {process.returncode}:\n{err.read().decode()[-3000:]}")
        # Libraries may say something, before or behind it.
        lines = [line for line in out.read().decode().splitlines() if line.startswith("{")]
    result: dict[str, Any] = {} if "--write" in given else json.loads(lines[-1])
    return {**result, "peak_mib": peak_bytes >> 20}


def held_bytes(process: psutil.Process) -> int:
    """Memory of a process and all that it started, shared pages by their share, files that are mapped left out."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total * 1024


def table(kind: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """Of each way the number of workers with which it was fastest, medians; ratios within a round."""

    def median(name: str, figure: str) -> float:
        return statistics.median(one[figure] for one in found[name])

    best = {}
    for name in found:
        way = name.split()[0]
        if way not in best or median(name, "rows_per_s") > median(best[way], "rows_per_s"):
            best[way] = name
    head = "| way, workers | rows/s | raymill / it | CPU s per million rows | peak MiB |"
    lines = [kind, "", head, "|---|---|---|---|---|"]
    for name in best.values():
        pairs = zip(found[best.get("raymill", name)], found[name], strict=True)
        ratio = statistics.median(ours["rows_per_s"] / its["rows_per_s"] for ours, its in pairs)
        held, used = median(name, "peak_mib"), median(name, "cpu_s_per_million_rows")
        lines.append(f"| {name} | {median(name, 'rows_per_s'):,.0f} | {ratio:.2f} | {used:,.1f} | {held:,.0f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
