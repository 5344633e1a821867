"""Train jobs of the catalogue as a user would; what they reach beside what their cards say, also in their READMEs.

    python tests/catalogue/train_jobs.py --out jobs.json mnist unet

Each job is fetched and trained by the commands of its README. Its picture and its figures go between two marks in there. What the
file of results has already is not trained again: delete it to begin anew.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from raymill.config.load import load_job
from raymill.config.spec import CardSpec
from raymill.record.folder import RunFolder

PROJECT = Path(__file__).parents[2]
BEGIN, END = "<!-- reached: written by `make jobs-vision` -->", "<!-- /reached -->"

VARIANTS = {
    "transfer": {"a trunk that nobody has trained": ["model.pretrained=false"]},
    "faster_rcnn": {"after one step": ["loop={steps: 1, global_batch_rows: 4}"]},
    "yolo": {"after one step": ["loop={steps: 1, global_batch_rows: 4}"]},
    "gan": {"WGAN-GP": ["model.kind=wgan_gp", "loop.epochs=60"]},
}
"""Job -> what stands beside it -> how it differs."""


@dataclass
class Result:
    """What came of one run."""

    job: str
    seconds: float
    metrics: dict[str, float]
    required: dict[str, str]
    met: bool
    rows_per_s: float
    weights_sha256: str
    run_id: str
    error: str = ""
    beside: dict[str, dict[str, float]] = field(default_factory=dict)


def train(job: str, *sets: str) -> tuple[dict[str, Any], float]:
    """Fetch the data, train; what `raymill train --json` printed, and the seconds that it took, start and end included."""
    raymill = [sys.executable, "-m", "raymill"]
    for command in (["data", "get", job], ["train", job, "--json", *(part for one in sets for part in ("--set", one))]):
        start_s = time.monotonic()
        done = subprocess.run([*raymill, *command], cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout), time.monotonic() - start_s


def result_of(job: str, card: CardSpec, before: Result | None) -> Result:
    """Train one job, and what stands beside it; but for what was trained before."""
    found = before or _trained(job, card)
    for name, sets in VARIANTS.get(job, {}).items() if found.metrics else ():
        if not found.beside.get(name):
            told, _ = train(job, *sets, "register=null")
            found.beside[name] = told.get("metrics", {})
            if not found.beside[name]:
                found.error, found.met = f"{name}: {told.get('message')}"[:500], False
    return found


def _trained(job: str, card: CardSpec) -> Result:
    told, seconds = train(job)
    required = {name: str(bound) for name, bound in card.expect.items()}
    if "metrics" not in told:
        return Result(job, seconds, {}, required, False, 0.0, "", "", error=str(told.get("message"))[:500])
    metrics = told["metrics"]
    met = all(bound.is_met_by(metrics.get(name, math.nan)) for name, bound in card.expect.items())
    return Result(job, seconds, metrics, required, met, told["rows_per_s"], told["weights_sha256"], told["run_id"])


def write_readme(result: Result, card: CardSpec) -> None:
    """The figures and the picture of a job, between the marks in its README."""
    folder = PROJECT / "jobs" / result.job
    lines = []
    if card.picture is not None:
        pictures = sorted((RunFolder(PROJECT / ".raymill" / "runs" / result.run_id).pictures).glob(f"{card.picture}-*.png"))
        shutil.copyfile(pictures[-1], folder / "picture.png")
        lines += [f"![{card.picture}](picture.png)", ""]
    others = list(result.beside)
    lines += [" | ".join(["| metric", "reached", "required", *others, ""]).rstrip(), "|---" * (3 + len(others)) + "|"]
    for name, value in sorted(result.metrics.items()):
        beside = [f"{result.beside[other].get(name, math.nan):.4g}" for other in others]
        lines.append(" | ".join([f"| {name}", f"{value:.4g}", result.required.get(name, ""), *beside, ""]).rstrip())
    cores = psutil.cpu_count()
    lines += ["", f"{result.seconds:.0f} s from the command to its end, on {cores} CPU cores; {result.rows_per_s:,.0f} rows/s."]
    readme = folder / "README.md"
    text = readme.read_text()
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    block = "\n".join([BEGIN, "", *lines, "", END])
    readme.write_text(pattern.sub(lambda _: block, text) if pattern.search(text) else f"{text.rstrip()}\n\n{block}\n")


def show(results: list[Result]) -> None:
    """Required beside reached."""
    table = Table("job", "metric", "required", "reached", "", "seconds")
    for one in results:
        for name in one.required or dict.fromkeys(list(one.metrics)[:1], ""):
            value = one.metrics.get(name, math.nan)
            mark = "yes" if one.met else one.error or "NO"
            table.add_row(one.job, name, one.required.get(name, ""), f"{value:.4g}", mark, f"{one.seconds:.0f}")
    Console().print(table)


def main() -> int:
    """Train all that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON")
    given = parser.parse_args()
    results: list[Result] = []
    known = json.loads(given.out.read_text())["jobs"] if given.out.exists() else []
    before = {one["job"]: Result(**one) for one in known if one["metrics"]}
    for job in given.jobs:
        card = load_job(job).spec.card
        if card is None:
            raise SystemExit(f"{job}: its job file has no card")
        results.append(result_of(job, card, before.get(job)))
        if results[-1].metrics:
            write_readme(results[-1], card)
        show(results)
        told = {"machine": f"{platform.machine()}, {psutil.cpu_count()} cores", "jobs": [asdict(one) for one in results]}
        given.out.write_text(json.dumps(told, indent=1))
    return 0 if all(one.met for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
