"""What a person sees of a run: a line for every event that says something, the step in a panel or every two seconds."""

from __future__ import annotations

import io
import re
import threading
from itertools import pairwise
from typing import Any, get_args

import pytest
from rich.console import Console

from raymill.data.bad_rows import BadRow
from raymill.orchestration import progress
from raymill.orchestration.progress import Progress, describe, history
from raymill.record.catalog import evaluations
from raymill.record.events import (
    AnyEvent,
    AttemptFailed,
    AttemptStarted,
    BadRowsFound,
    CheckpointSaved,
    DeliveryStarted,
    DrainNoticed,
    EvaluationDone,
    EvaluationGoesOn,
    Event,
    FirstStepDone,
    ResizeStarted,
    RunFinished,
    RunStopped,
    StageReached,
    StandbyDecided,
    StepDone,
    StepRefused,
    StragglerFound,
    TaskChanged,
    TrainingEnded,
)


def started(step: int = 0, num_workers: int = 2, **more: Any) -> AttemptStarted:
    return AttemptStarted(attempt=1, num_workers=num_workers, step=step, num_total_steps=100, resumed=step > 0, **more)


def step(number: int, **more: Any) -> StepDone:
    metrics = {"train/loss": 0.25, "train/learning_rate": 0.1}
    return StepDone(**{"step": number, "epoch": 3, "rows": 10 * number, "metrics": metrics, **more})


class Clock:
    """Stands for the `time` of progress; moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def plain_console(file: io.StringIO) -> Console:
    return Console(file=file, width=40, _environ={})


def shown(*events: Event) -> list[str]:
    """The lines that a console which is no terminal gets of these events."""
    file = io.StringIO()
    with Progress(plain_console(file)) as under_test:
        for event in events:
            under_test.show(event)
    return file.getvalue().splitlines()


# ---------------------------------------------------------------- lines

ROWS = [BadRow("train", 31, "part-0.parquet", 3, 1, "damaged [bold]"), BadRow("train", 32, "part-0.parquet", 3, 2, "damaged")]

LINES: list[tuple[Event, list[str]]] = [
    (started(), ["attempt 1: 2 workers, started"]),
    (started(num_workers=1), ["attempt 1: 1 worker, started"]),
    (started(step=40, notes=("one", "two")), ["attempt 1: 2 workers, resumed at step 40", "note: one", "note: two"]),
    (StageReached(stage="starting Ray"), ["starting Ray"]),
    (StandbyDecided(started=False, reason="no memory"), []),
    (
        StandbyDecided(started=True, reason="the run has 900 s to go"),
        ["a second driver is being made ready, to go on should this one die (the run has 900 s to go)"],
    ),
    (FirstStepDone(step=1), ["first step done"]),
    (
        EvaluationDone(step=10, epoch=0, rows=50, metrics={"validation/loss": 0.123456, "validation/accuracy": 0.5}),
        ["epoch 0, step 10: validation/loss 0.1235  validation/accuracy 0.5"],
    ),
    (CheckpointSaved(step=10, path="checkpoints/step-00000010.1", best=True), []),
    (
        StepRefused(step=7, epoch=0, position=70, rows=[1, 2], policy="skip"),
        ["step 7 was not taken: its gradient was not a number (loop.on_nan: skip)"],
    ),
    (
        BadRowsFound(rows=ROWS),
        ["2 bad rows left out, the first of them part-0.parquet, part 3, row 1 (train row 31): damaged [bold]"],
    ),
    (ResizeStarted(num_workers=3), ["going on with 3 workers; saving first"]),
    (
        DrainNoticed(nodes=("a", "b"), left_s=29.6, goes_on=True),
        ["nodes a, b are to leave the cluster in 30 s; saving, to go on elsewhere"],
    ),
    (DrainNoticed(nodes=("a", "b"), left_s=None, goes_on=False), ["nodes a, b are to leave the cluster; saving, to stop"]),
    (
        StragglerFound(step=10, rank=1, factor=3.14159, lost_s=0.256),
        [
            "warning: rank 1 computes 3.1 times slower than the others, which wait 0.26 s for it in each step; "
            "look what else runs on its machine"
        ],
    ),
    (
        TaskChanged(step=2, attributes=("counter", "seen")),
        [
            "warning: the task's attributes counter, seen changed in a step. They are not saved, so a resumed run would differ: "
            "keep state in buffers of the model (register_buffer)"
        ],
    ),
    (EvaluationGoesOn(epoch=1, batch=3, num_batches=9), []),
    (
        TrainingEnded(step=7, reason="the loss stands still"),
        ["training ends behind step 7: the loss stands still"],
    ),
    (RunStopped(reason="failed", message="rank 1 died"), []),
    (RunFinished(best_checkpoint=None, metrics={"validation/loss": 0.5}), []),
    (
        AttemptFailed(cause="lost process", message="rank 1 died", step=40, last_step=47),
        ["lost process after step 47: rank 1 died; going on from the checkpoint of step 40"],
    ),
    (
        AttemptFailed(cause="stall", message="nobody moved", step=0),
        ["stall before a step was done: nobody moved; beginning again"],
    ),
    (
        AttemptFailed(cause="lost process", message="rank 1 died", step=40, pause_s=5.0),
        ["lost process before a step was done: rank 1 died; going on from the checkpoint of step 40 in 5 s"],
    ),
    (DeliveryStarted(), ["delivering the run to MLflow"]),
]


@pytest.mark.parametrize(("event", "lines"), LINES, ids=lambda value: getattr(value, "kind", ""))
def test_an_event_is_shown_in_these_words(event: Event, lines: list[str]) -> None:
    assert describe(event) == lines
    # Neither cut to the width nor read as markup.
    assert shown(event) == lines


def test_every_kind_of_event_is_accounted_for() -> None:
    assert {type(event) for event, _ in LINES} | {StepDone} == set(get_args(AnyEvent))


# ---------------------------------------------------------------- steps where nothing can be redrawn


def test_a_step_is_one_line_with_its_values() -> None:
    event = step(12, rows_per_s=12345.6, data_wait_share=0.125)
    assert describe(event) == []
    assert shown(started(), event)[1:] == ["step 12 / 100  epoch 3  loss 0.2500  rows/s 12,346  waiting for data 12%  ETA ?"]


def test_a_step_without_speeds_or_a_loss_is_shown_as_such() -> None:
    assert shown(started(), step(1, metrics={}))[1:] == ["step 1 / 100  epoch 3  loss nan  rows/s 0  waiting for data 0%  ETA ?"]


def test_the_loss_of_an_objective_of_its_own_name_is_shown() -> None:
    metrics = {"train/generator_loss": 0.75, "train/critic_loss": 0.5}
    assert "generator_loss 0.7500" in shown(started(), step(1, metrics=metrics))[1]


def test_lines_about_steps_come_at_most_every_two_seconds(clock: Clock) -> None:
    file = io.StringIO()
    with Progress(plain_console(file)) as under_test:
        under_test.show(started())
        for number in range(1, 101):
            under_test.show(step(number))
            clock.now_s += 0.1
    steps = [int(text) for text in re.findall(r"^step (\d+) / 100", file.getvalue(), re.MULTILINE)]
    assert steps[0] == 1
    assert len(steps) == 5
    assert {later - earlier for earlier, later in pairwise(steps)} <= {20, 21}


def test_other_lines_do_not_wait(clock: Clock) -> None:
    events = [started(), step(1), ResizeStarted(num_workers=3), step(2), DeliveryStarted()]
    assert [line.split()[0] for line in shown(*events)] == ["attempt", "step", "going", "delivering"]


# ---------------------------------------------------------------- how long it still takes


def eta_after(clock: Clock, number: int, elapsed_s: float, first: int = 0) -> str:
    file = io.StringIO()
    with Progress(plain_console(file)) as under_test:
        under_test.show(started(step=first))
        under_test.show(FirstStepDone(step=first + 1))
        clock.now_s += elapsed_s
        under_test.show(step(number))
    return file.getvalue().splitlines()[-1].partition("ETA ")[2]


def test_the_time_left_follows_from_the_steps_after_the_first(clock: Clock) -> None:
    assert eta_after(clock, 11, elapsed_s=5) == "44 s", "10 steps in 5 s, 89 steps left"
    assert eta_after(clock, 100, elapsed_s=50) == "0 s"


def test_steps_before_a_resume_say_nothing_of_the_time_left(clock: Clock) -> None:
    assert eta_after(clock, 61, elapsed_s=40, first=50) == "156 s", "10 steps in 40 s, 39 steps left"


def test_the_first_step_tells_no_time(clock: Clock) -> None:
    assert eta_after(clock, 1, elapsed_s=5) == "?"
    assert eta_after(clock, 51, elapsed_s=5, first=50) == "?"


def test_another_attempt_counts_its_time_from_its_own_first_step(clock: Clock) -> None:
    file = io.StringIO()
    with Progress(plain_console(file)) as under_test:
        for attempt in (started(), started(step=20)):
            under_test.show(attempt)
            clock.now_s += 1000
            under_test.show(FirstStepDone(step=attempt.step + 1))
        clock.now_s += 9
        under_test.show(step(30))
    assert file.getvalue().splitlines()[-1].endswith("ETA 70 s"), "9 steps in 9 s, 70 steps left"


# ---------------------------------------------------------------- the panel


class Terminal(io.StringIO):
    """What is sent to a terminal, also by the thread of rich that redraws the panel."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def write(self, text: str) -> int:
        with self._changed:
            self._changed.notify_all()
            return super().write(text)

    def wait_for(self, text: str) -> None:
        """Return once this was drawn."""
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.getvalue(), timeout=30)

    def lines(self) -> list[str]:
        """What stands on it now, without colours; understands what rich sends."""
        lines, row = [""], 0
        for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", self.getvalue()):
            if part == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif part == "\x1b[1A":
                row -= 1
            elif part == "\x1b[2K":
                lines[row] = ""
            elif part and part != "\r" and not part.startswith("\x1b"):
                lines[row] += part
        return [line.rstrip() for line in lines if line.strip()]


def terminal_console(terminal: Terminal) -> Console:
    return Console(file=terminal, force_terminal=True, width=80, _environ={})


PANEL = """\
━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━
step              12 / 100
epoch             3
loss              0.2500
rows/s            500
waiting for data  12%
ETA               ?""".splitlines()


def test_a_terminal_has_a_panel_below_the_lines_that_goes_when_the_run_ends() -> None:
    terminal = Terminal()
    with Progress(terminal_console(terminal)) as under_test:
        under_test.show(started())
        under_test.show(step(12, rows_per_s=500.0, data_wait_share=0.125))
        terminal.wait_for(PANEL[1])
        assert terminal.lines() == ["attempt 1: 2 workers, started", *PANEL]
        under_test.show(ResizeStarted(num_workers=3))
        assert terminal.lines() == ["attempt 1: 2 workers, started", "going on with 3 workers; saving first", *PANEL]
    assert terminal.lines() == ["attempt 1: 2 workers, started", "going on with 3 workers; saving first"]


def test_the_panel_shows_the_latest_step() -> None:
    terminal = Terminal()
    with Progress(terminal_console(terminal)) as under_test:
        under_test.show(started())
        for number in (12, 13):
            under_test.show(step(number, rows_per_s=500.0, data_wait_share=0.125))
            terminal.wait_for(f"{number} / 100")
        assert terminal.lines()[1:] == ["━━━━━╺" + "━" * 34, "step              13 / 100", *PANEL[2:]]


def evaluated(epoch: int, accuracy: float, *, best: bool) -> list[Event]:
    metrics = {"validation/loss": 1 - accuracy, "validation/accuracy": accuracy}
    number = 10 * (epoch + 1)
    return [
        EvaluationDone(step=number, epoch=epoch, rows=50, metrics=metrics),
        CheckpointSaved(step=number, path=f"checkpoints/step-{number}.1", best=best),
    ]


def test_the_panel_has_the_history_of_the_validation_with_the_best_marked() -> None:
    terminal = Terminal()
    with Progress(terminal_console(terminal)) as under_test:
        under_test.show(started())
        for event in [*evaluated(0, 0.5, best=True), *evaluated(1, 0.75, best=True), *evaluated(2, 0.625, best=False)]:
            under_test.show(event)
        terminal.wait_for("0.625")
        assert terminal.lines()[1:] == [
            "epoch  step  validation/loss  validation/accuracy",
            "0      10    0.5              0.5",
            "1      20    0.25             0.75                 best",
            "2      30    0.375            0.625",
        ]


def test_a_long_history_keeps_its_best_and_its_last_rows_and_the_telling_metric_first() -> None:
    events = [event for epoch in range(9) for event in evaluated(epoch, 0.9 - epoch / 10, best=epoch == 1)]
    columns, rows = history(evaluations(events), "validation/accuracy", 4)
    assert columns == ["epoch", "step", "validation/accuracy", "validation/loss", ""]
    assert [(row[0], row[-1]) for row in rows] == [("1", "best"), ("6", ""), ("7", ""), ("8", "")]
    assert len(history(evaluations(events), None, 9)[1]) == 9


def test_an_evaluation_that_is_done_again_after_a_failure_stands_there_once() -> None:
    events = [*evaluated(0, 0.5, best=True), *evaluated(1, 0.9, best=False), started(step=10), *evaluated(1, 0.75, best=True)]
    found = [(entry["step"], entry["metrics"]["validation/accuracy"], entry["best"]) for entry in evaluations(events)]
    assert found == [(10, 0.5, False), (20, 0.75, True)]


def test_a_terminal_gets_plain_lines_where_the_jobs_own_code_may_ask_or_print() -> None:
    terminal = Terminal()
    with Progress(terminal_console(terminal), live=False) as under_test:
        under_test.show(started())
        under_test.show(step(12))
    assert terminal.getvalue() == (
        "attempt 1: 2 workers, started\nstep 12 / 100  epoch 3  loss 0.2500  rows/s 0  waiting for data 0%  ETA ?\n"
    )


def test_a_terminal_that_cannot_be_redrawn_gets_plain_lines() -> None:
    terminal = Terminal()
    with Progress(Console(file=terminal, force_terminal=True, width=80, _environ={"TERM": "dumb"})) as under_test:
        under_test.show(started())
        under_test.show(step(12))
    assert [line.partition("  ")[0] for line in terminal.lines()] == ["attempt 1: 2 workers, started", "step 12 / 100"]


def fail_while_drawn(terminal: Terminal) -> None:
    with Progress(terminal_console(terminal)) as under_test:
        under_test.show(step(12))
        terminal.wait_for("ETA")
        raise ZeroDivisionError


def test_the_panel_goes_and_the_cursor_is_back_also_when_the_run_fails() -> None:
    terminal = Terminal()
    with pytest.raises(ZeroDivisionError):
        fail_while_drawn(terminal)
    assert terminal.lines() == []
    hidden, shown_again = terminal.getvalue().rfind("\x1b[?25l"), terminal.getvalue().rfind("\x1b[?25h")
    assert 0 <= hidden < shown_again
