"""Provokes the faults and prints what came of each, beside a run that nothing happened to.

    python -m faults.run_faults                 every case of faults.cases
    python -m faults.run_faults --part quick    those of `make test`
    python -m faults.run_faults --only 22,36    those of these numbers
    python -m faults.run_faults --kills 20      SIGKILL of one worker at a random step, 1, 2 and 3 workers in turn
    python -m faults.run_faults --sweep --limit 30
                                                counts the points of a run, then kills at each one, first pass first
    python -m faults.run_faults --soak 600 --seed 7
                                                random faults for some seconds; the seed replays them

Exits with 1 when any fails. With KEEP=1 in the environment the folders of the runs stay, to be looked at.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, reduce
from pathlib import Path

from rich.console import Console
from rich.table import Table

from faults.cases import CASES, NOT_YET, Case, Play, arguments, can_mount, survives
from faults.harness import Live, Result, live, play
from raymill.faults import POINTS

NUM_STEPS = 40
VERDICTS = ("order", "weights", "intact", "clean")


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        case: its number, name, how and workers.
        attempts: worker groups that started in all.
        exit_codes: of its commands.
        happened: what the commands said of the fault.
        same_order: whether each batch had its rows, or None where that was not asked.
        same_weights: likewise.
        intact: whether the last checkpoints are whole.
        clean: whether nothing was left.
        problems: everything that is not as it must be; none: passed.
        seconds: it took.
    """

    number: int
    name: str
    how: str
    workers: int
    attempts: int
    exit_codes: list[int | None]
    happened: str
    same_order: bool | None
    same_weights: bool | None
    intact: bool
    clean: bool
    problems: list[str]
    seconds: float


@cache
def reference(job: tuple[str, ...], workers: int) -> Result:
    """The run that nothing happens to. Raises AssertionError when it fails all the same."""
    with live() as place:
        case = Case(0, "reference", "", (Play(),), job, workers)
        result = play(place, arguments(case, case.plays[0], place))
        assert result.exit_code == 0, f"the undisturbed run failed: {result.message} {result.said[-2000:]}"
        assert result.attempts == 1, f"the undisturbed run took {result.attempts} attempts"
        return result


def run_case(case: Case) -> Outcome:
    """Run a case's commands and judge what is left."""
    begun_s = time.monotonic()
    results: list[Result] = []
    problems: list[str] = []
    with live() as place:
        for command in case.plays:
            try:
                result = run_play(place, case, command)
            except AssertionError as error:
                problems.append(str(error))
                break
            results.append(result)
            problems += judge(command, result)
            if problems:
                problems.append(f"said: {' '.join(result.said.split())[-700:]}")
                break
    last = results[-1] if results else None
    same_order = same_weights = None
    if case.same and last and not problems:
        # Rows are the same as with the first number of workers; weights, unless strict, as with the last.
        expected = reference(case.job, (case.same == "weights" and case.plays[-1].workers) or case.workers)
        same_order = last.order == expected.order
        if case.same == "weights":
            same_weights = last.weights == expected.weights
    problems += [] if same_order is not False else ["other rows in some batch"]
    problems += [] if same_weights is not False else ["other weights"]
    return Outcome(
        case.number,
        case.name,
        case.how,
        case.workers,
        last.attempts if last else 0,
        [result.exit_code for result in results],
        happened(results),
        same_order,
        same_weights,
        intact=not any(result.broken for result in results),
        clean=not any(result.left for result in results),
        problems=problems,
        seconds=time.monotonic() - begun_s,
    )


def run_play(place: Live, case: Case, command: Play) -> Result:
    """Prepare and run one command."""
    if command.prepare:
        command.prepare(place)
    place.forget_faults()
    return play(place, arguments(case, command, place), command.fault, command.provoke, orphans=command.orphans)


def judge(command: Play, result: Result) -> list[str]:
    """Everything in a command's result that is not as it must be."""
    wanted = [part.split(":")[0] for part in command.fault.split(",") if part and ":slow" not in part]
    silent = Counter(wanted) - Counter(result.fired)
    text = f"{result.message} {result.said}"
    problems = {
        f"exit code {result.exit_code}, not {command.exit_code}": result.exit_code != command.exit_code,
        f"did not say {command.says!r}": re.search(command.says, " ".join(text.split())) is None,
        f"{result.attempts} attempts, not {command.attempts}": command.attempts not in (None, result.attempts),
        "the fault was not provoked": not result.provoked,
        f"did not happen: {sorted(silent)}": bool(silent),
        "a traceback was shown": "Traceback" in text,
    }
    found = {
        name: reduce(lambda values, part: values.get(part, {}), name.split("."), result.summary) for name, _ in command.summary
    }
    others = [f"the summary's {name} is {found[name]}, not {value}" for name, value in command.summary if found[name] != value]
    return [name for name, wrong in problems.items() if wrong] + [
        *others,
        *result.broken,
        *(f"left: {name}" for name in result.left),
        *result.tracked,
    ]


def happened(results: list[Result]) -> str:
    """What the commands said of what went wrong, shortened."""
    lines = [line for result in results for line in result.said.splitlines()]
    told = [line for line in lines if re.match(r"lost process|stall|storage|\w*(Error|Interrupted)\b|checkpoint .* passed", line)]
    told = [line for line in told if not line.startswith("InputError")]
    details = [result.message.splitlines()[1].strip() for result in results if "\n" in result.message]
    short = [re.sub(r"/\S*/", "", line)[:90] for line in [*told, *details]]
    return " | ".join(short[:3]) + (f" (+{len(short) - 3})" if len(short) > 3 else "")


# ---------------------------------------------------------------- many of one kind


def random_kills(count: int, seed: int) -> Iterator[Case]:
    """SIGKILL of one worker at a random step and point."""
    generator = random.Random(seed)
    for number in range(count):
        workers = number % 3 + 1
        step, rank = generator.randint(1, NUM_STEPS), generator.randrange(workers)
        point = generator.choice(["before_forward", "after_forward", "after_backward", "after_optimizer", "step_done"])
        yield killed_at(f"{point}:kill:rank={rank}:step={step}", workers)


def killed_at(fault: str, workers: int) -> Case:
    """A case of one fault from inside that a run survives."""
    return Case(22, "killed at a point", fault, survives(fault, attempts=None), workers=workers)


def sweep(workers: int, limit: int) -> Iterator[Case]:
    """A kill at each point that a run passes: at its first pass on each rank, then its last, then those between."""
    with live() as place:
        case = Case(0, "counted", "", (Play(fault="count"),), workers=workers)
        play(place, arguments(case, case.plays[0], place), "count")
        lines = (place.faults / "passes.jsonl").read_text().splitlines()
    passes = Counter((record["point"], record.get("rank")) for record in map(json.loads, lines))
    missed = POINTS.keys() - {point for point, _ in passes}
    print(f"{sum(passes.values())} passes of {len(POINTS) - len(missed)} points; not passed: {sorted(missed) or 'none'}")
    firsts = [(place, 1) for place in passes]
    lasts = [(place, count) for place, count in passes.items() if count > 1]
    middles = [(place, count // 2) for place, count in passes.items() if count > 3]
    for (point, rank), hit in [*firsts, *lasts, *middles][:limit]:
        where = "" if rank is None else f":rank={rank}"
        # Passes of reading tasks and of the tracking process are spread over processes: only the first is sure to come.
        yield killed_at(f"{point}:kill{where}:hit={1 if rank is None else hit}", workers)


def soak(seconds: float, seed: int) -> Iterator[Case]:
    """Random faults, several in each run, until the time is over."""
    generator = random.Random(seed)
    print(f"seed {seed}")
    inside = ["before_forward", "after_backward", "step_done", "before_checksums", "before_pointer", "after_pointer"]
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        workers = generator.randint(1, 3)
        parts = [
            f"{generator.choice(inside)}:kill:rank=0:hit={generator.randint(1, 5)}:attempt={attempt}"
            for attempt in range(1, generator.randint(2, 4))
        ]
        yield killed_at(",".join(parts), workers)


# ---------------------------------------------------------------- the table


def show(outcomes: list[Outcome]) -> None:
    """Print the table, and what failed in full."""
    columns = ("#", "fault", "provoked by", "workers", "starts", "exit", "what was said", *VERDICTS)
    table = Table(*columns, box=None, header_style="bold")
    for done in outcomes:
        verdicts = [done.same_order, done.same_weights, done.intact, done.clean]
        marks = ["-" if value is None else "same" if value else "OTHER" for value in verdicts[:2]]
        marks += ["yes" if value else "NO" for value in verdicts[2:]]
        exits = " ".join(map(str, done.exit_codes))
        row = [done.number, done.name, done.how, done.workers, done.attempts, exits, done.happened, *marks]
        table.add_row(*map(str, row), style="red" if done.problems else None)
    console = Console(width=200, markup=False, highlight=False)
    console.print(table)
    for done in outcomes:
        if done.problems:
            console.print(f"\nFAILED {done.number} {done.name} ({done.how}):")
            for problem in done.problems:
                console.print(f"  {problem}")


def chosen(options: argparse.Namespace) -> Iterator[Case]:
    """The cases that were asked for."""
    if options.kills:
        yield from random_kills(options.kills, options.seed)
    elif options.sweep:
        yield from sweep(options.workers, options.limit)
    elif options.soak:
        yield from soak(options.soak, options.seed)
    else:
        numbers = {int(number) for number in options.only.split(",")} if options.only else None
        for case in CASES:
            if (numbers is None or case.number in numbers) and (options.part == "all" or case.quick):
                if case.mounts and not can_mount():
                    NOT_YET[case.number] = f"{case.name}: needs the right to mount"
                    continue
                yield case


def main() -> int:
    """Run what was asked for; returns 1 when any fails."""
    parser = argparse.ArgumentParser(prog="python -m faults.run_faults", description="Provoke faults.")
    parser.add_argument("--part", choices=("all", "quick"), default="all")
    parser.add_argument("--only", help="numbers, separated by commas")
    parser.add_argument("--kills", type=int, default=0, help="runs")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--workers", type=int, default=2, help="of the sweep")
    parser.add_argument("--limit", type=int, default=30, help="runs of the sweep")
    parser.add_argument("--soak", type=float, default=0, help="seconds")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    options = parser.parse_args()
    # Ended politely, it ends the run of the moment too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes = []
    for case in chosen(options):
        done = run_case(case)
        outcomes.append(done)
        verdict = "FAILED" if done.problems else "passed"
        print(f"{verdict}  {case.number:2} {case.name}, {case.workers} workers: {case.how} ({done.seconds:.0f} s)", flush=True)
        for problem in done.problems:
            print(f"        {problem}", flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    show(outcomes)
    if not (options.kills or options.sweep or options.soak or options.only):
        for number, why in sorted(NOT_YET.items()):
            print(f"not yet: {number}: {why}")
    failed = sum(bool(done.problems) for done in outcomes)
    if options.kills or options.soak:
        print(f"seed {options.seed}")
    print(f"{len(outcomes) - failed} passed, {failed} failed")
    return 1 if failed or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
