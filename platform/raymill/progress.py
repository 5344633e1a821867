"""What a person sees of a run while it goes: a live panel on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

PLAIN_INTERVAL_S = 2.0
"""Seconds between plain lines about steps."""


class Progress:
    """Shows events. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        """Show on this console; live if it is a terminal."""
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._total_steps = 0
        self._started_s: float | None = None
        self._first_step = 0
        self._evaluation = ""
        self._last_plain_s = 0.0

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["kind"]
        if kind == "start":
            self._total_steps, self._first_step = event["num_total_steps"], event["step"]
            how = f"resumed at step {event['step']}" if event["resumed"] else "started"
            self._say(f"attempt {event['attempt']}: {event['num_workers']} workers, {how}")
            for note in event.get("notes", []):
                self._say(f"note: {note}")
        elif kind == "first_step":
            self._started_s = time.monotonic()
            self._say("first step done")
        elif kind == "step":
            self._step(event)
        elif kind == "evaluation":
            self._evaluation = "  ".join(f"{name} {value:.4g}" for name, value in event["metrics"].items())
            self._say(f"epoch {event['epoch']}: {self._evaluation}")
        elif kind == "bad_rows":
            first = event["rows"][0]
            where = f"{first['file']}, part {first['part']}, row {first['place']}: {first['reason']}"
            self._say(f"{len(event['rows'])} bad rows left out, the first of them {where}")
        elif kind == "drain":
            when = f" in {event['left_s']:.0f} s" if event["left_s"] is not None else ""
            then = "to go on elsewhere" if event["goes_on"] else "to stop"
            self._say(f"nodes {', '.join(event['nodes'])} are to leave the cluster{when}; saving, {then}")
        elif kind == "slow_rank":
            self._say(
                f"warning: rank {event['rank']} computes {event['factor']:.2g} times slower than the others, which wait "
                f"{event['lost_s']:.2f} s for it in each step; look what else runs on its machine"
            )
        elif kind == "restart":
            self._say(f"{event['cause']} at step {event['step']}: {event['message']}; going on from there")
        elif kind == "delivering":
            self._say("delivering the run to MLflow")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _step(self, event: dict[str, Any]) -> None:
        done = event["step"]
        loss = next((value for name, value in event["metrics"].items() if name.endswith("loss")), float("nan"))
        values = {
            "step": f"{done} / {self._total_steps}",
            "epoch": str(event["epoch"]),
            "loss": f"{loss:.4f}",
            "rows/s": f"{event.get('rows_per_s', 0):,.0f}",
            "waiting for data": f"{event.get('data_wait_share', 0):.0%}",
            "ETA": self._eta(done),
        }
        if self._live:
            table = Table.grid(padding=(0, 2))
            for name, value in values.items():
                table.add_row(name, value)
            self._live.update(table)
        elif time.monotonic() - self._last_plain_s >= PLAIN_INTERVAL_S:
            self._last_plain_s = time.monotonic()
            self._say("  ".join(f"{name} {value}" for name, value in values.items()))

    def _eta(self, done: int) -> str:
        if self._started_s is None or done <= self._first_step + 1:
            return "?"
        per_step_s = (time.monotonic() - self._started_s) / (done - self._first_step - 1)
        return f"{per_step_s * (self._total_steps - done):.0f} s"
