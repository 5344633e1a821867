"""What a person sees of a run while it goes: a live panel on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raymill.record.catalog import evaluations
from raymill.record.events import (
    AttemptFailed,
    AttemptStarted,
    BadRowsFound,
    CheckpointSaved,
    DeliveryStarted,
    DrainNoticed,
    EvaluationDone,
    Event,
    FirstStepDone,
    ResizeStarted,
    StageReached,
    StandbyDecided,
    StepDone,
    StepRefused,
    StragglerFound,
    TaskChanged,
    TrainingEnded,
)
from raymill.redaction import for_people

PLAIN_INTERVAL_S = 2.0
"""Seconds between plain lines about steps."""

MOST_EVALUATIONS, MOST_METRICS = 6, 6
"""Rows of the panel's table, and metrics in any."""

BAR_WIDTH, NOTEBOOK_WIDTH = 40, 100


def describe(event: Event) -> list[str]:
    """What people are told of an event, in lines; none for those that the panel shows, or that need no word."""
    match event:
        case AttemptStarted():
            how = f"resumed at step {event.step}" if event.resumed else "started"
            workers = "1 worker" if event.num_workers == 1 else f"{event.num_workers} workers"
            return [f"attempt {event.attempt}: {workers}, {how}", *(f"note: {note}" for note in event.notes)]
        case StageReached():
            return [event.stage]
        case StandbyDecided(started=True):
            return [f"a second driver is being made ready, to go on should this one die ({event.reason})"]
        case FirstStepDone():
            return ["first step done"]
        case EvaluationDone():
            measured = "  ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
            return [f"epoch {event.epoch}, step {event.step}: {measured}"]
        case TrainingEnded():
            return [f"training ends behind step {event.step}: {event.reason}"]
        case StepRefused():
            return [f"step {event.step} was not taken: its gradient was not a number (loop.on_nan: {event.policy})"]
        case BadRowsFound():
            if len(event.rows) == 1:
                return [f"1 bad row left out: {event.rows[0]}"]
            return [f"{len(event.rows)} bad rows left out, the first of them {event.rows[0]}"]
        case ResizeStarted():
            return [f"going on with {event.num_workers} workers; saving first"]
        case DrainNoticed():
            when = f" in {event.left_s:.0f} s" if event.left_s is not None else ""
            then = "to go on elsewhere" if event.goes_on else "to stop"
            return [f"nodes {', '.join(event.nodes)} are to leave the cluster{when}; saving, {then}"]
        case StragglerFound():
            return [
                f"warning: rank {event.rank} computes {event.factor:.2g} times slower than the others, which wait "
                f"{event.lost_s:.2f} s for it in each step; look what else runs on its machine"
            ]
        case TaskChanged():
            return [
                f"warning: the task's attributes {', '.join(event.attributes)} changed in a step. They are not saved, so a "
                "resumed run would differ: keep state in buffers of the model (register_buffer)"
            ]
        case AttemptFailed():
            died = "before a step was done" if event.last_step is None else f"after step {event.last_step}"
            then = f"going on from the checkpoint of step {event.step}" if event.step else "beginning again"
            pause = f" in {event.pause_s:.0f} s" if event.pause_s else ""
            return [f"{event.cause} {died}: {event.message}; {then}{pause}"]
        case DeliveryStarted():
            return ["delivering the run to MLflow"]
    return []


class Progress:
    """Shows events. Use as a context manager."""

    def __init__(self, console: Console, *, live: bool = True) -> None:
        """Show on this console.

        Args:
            live: whether a panel may be drawn and redrawn; not where the job's own code may ask or print in between.
        """
        self._console = console
        self._panel: Panel | None = None
        if live and console.is_jupyter:
            self._panel = NotebookPanel()
        elif live and console.is_interactive:
            self._panel = TerminalPanel(console)
        self._events: list[Event] = []
        self._total_steps = 0
        self._started_s: float | None = None
        self._first_step = 0
        self._last_plain_s = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._panel:
            self._panel.close()

    def show(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, AttemptStarted):
            self._total_steps, self._first_step = event.num_total_steps, event.step
        elif isinstance(event, FirstStepDone):
            self._started_s = time.monotonic()
        elif isinstance(event, StepDone):
            self._show_step(event)
        elif isinstance(event, StageReached) and self._panel:
            self._panel.update({event.stage: Seconds()})
            return
        if isinstance(event, AttemptStarted | EvaluationDone | CheckpointSaved):
            self._events.append(event)
            if self._panel:
                self._panel.set_history(*history(evaluations(self._events), None, MOST_EVALUATIONS))
        # The panel has a table of these.
        if not (self._panel and isinstance(event, EvaluationDone)):
            for line in describe(event):
                self._say(line)

    def _say(self, line: str) -> None:
        self._console.print(for_people(line), highlight=False, markup=False, emoji=False, soft_wrap=True)

    def _show_step(self, event: StepDone) -> None:
        # The first metric of a step is the loss of the first objective; a step that was passed over has none.
        name, loss = next(iter(event.metrics.items()), ("loss", float("nan")))
        values = {
            "step": f"{event.step} / {self._total_steps}",
            "epoch": str(event.epoch),
            name.removeprefix("train/"): f"{loss:.4f}",
            "rows/s": f"{event.rows_per_s or 0:,.0f}",
            "waiting for data": f"{event.data_wait_share or 0:.0%}",
            "ETA": self._eta(event.step),
        }
        if self._panel:
            self._panel.update(values, event.step, self._total_steps)
        elif time.monotonic() - self._last_plain_s >= PLAIN_INTERVAL_S:
            self._last_plain_s = time.monotonic()
            self._say("  ".join(f"{name} {value}" for name, value in values.items()))

    def _eta(self, done: int) -> str:
        if self._started_s is None or done <= self._first_step + 1:
            return "?"
        per_step_s = (time.monotonic() - self._started_s) / (done - self._first_step - 1)
        return f"{per_step_s * (self._total_steps - done):.0f} s"


class Seconds:
    """Shows how long it has been there."""

    def __init__(self) -> None:
        self._since_s = time.monotonic()

    def __str__(self) -> str:
        return f"{time.monotonic() - self._since_s:.0f} s"

    def __rich__(self) -> Text:
        return Text(str(self))


class _Panel:
    """What is drawn: a bar of the steps, the values of the last one, and the history of the validation."""

    def __init__(self) -> None:
        self._step, self._total_steps = 0, 0
        self._values: Mapping[str, object] = {}
        self._columns: list[str] = []
        self._rows: list[list[str]] = []

    def update(self, values: Mapping[str, object], step: int = 0, total_steps: int = 0) -> None:
        """Show these values instead, and a bar at this step where there are steps."""
        self._values, self._step, self._total_steps = values, step, total_steps
        self._draw()

    def set_history(self, columns: list[str], rows: list[list[str]]) -> None:
        """Show this table below; see `history`."""
        self._columns, self._rows = columns, rows
        self._draw()

    def _draw(self) -> None:
        raise NotImplementedError

    def _picture(self) -> Group:
        parts: list[RenderableType] = []
        if self._total_steps:
            # In a table, since a bar alone ends no line.
            bar = Table.grid()
            bar.add_row(ProgressBar(self._total_steps, self._step, width=BAR_WIDTH))
            parts.append(bar)
        parts.append(_table(list(self._values.items())))
        if self._rows:
            parts += [Text(), _table([self._columns, *self._rows])]
        return Group(*parts)


class TerminalPanel(_Panel):
    """A panel that is redrawn at the bottom of a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._live.start()

    def _draw(self) -> None:
        self._live.update(self._picture())

    def close(self) -> None:
        """Take the panel away."""
        self._live.stop()


class NotebookPanel(_Panel):
    """A panel that is redrawn in the output of a notebook's cell."""

    def __init__(self) -> None:
        super().__init__()
        self._update: Callable[..., Any] | None = None
        self._last_s = 0.0

    def _draw(self) -> None:
        # At most four times a second.
        if time.monotonic() - self._last_s < 0.25:
            return
        self._last_s = time.monotonic()
        from IPython.display import display

        text = io.StringIO()
        Console(file=text, width=NOTEBOOK_WIDTH, force_jupyter=False).print(self._picture())
        data = {"text/plain": text.getvalue()}
        if self._update is None:
            self._update = display(data, raw=True, display_id=True).update  # type: ignore[no-untyped-call]
        else:
            self._update(data, raw=True)

    def close(self) -> None:
        """The last picture stays, with all that came after it was drawn."""
        self._last_s = 0.0
        if self._values or self._rows:
            self._draw()


Panel = TerminalPanel | NotebookPanel


def history(evaluations: list[dict[str, Any]], first: str | None, most: int) -> tuple[list[str], list[list[str]]]:
    """The history of the validation as a table: names of columns, and the cells of each row.

    Args:
        evaluations: see `raymill.record.catalog.evaluations`.
        first: the metric that comes first, if it was measured.
        most: rows, of the last evaluations and of the best one.
    """
    names = dict.fromkeys(name for entry in evaluations for name in entry["metrics"])
    shown = sorted(names, key=lambda name: name != first)[:MOST_METRICS]
    latest = evaluations[-most:]
    earlier_best = [entry for entry in evaluations[:-most] if entry["best"]]
    kept = [*earlier_best, *latest[1 if earlier_best else 0 :]]
    rows = [
        [
            *(str(entry["epoch"]), str(entry["step"])),
            *(f"{entry['metrics'][name]:.4g}" if name in entry["metrics"] else "-" for name in shown),
            "best" if entry["best"] else "",
        ]
        for entry in kept
    ]
    return ["epoch", "step", *shown, ""], rows


def _table(rows: Sequence[Sequence[object]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Seconds) else Text(for_people(cell)) for cell in row))
    return table
