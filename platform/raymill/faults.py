"""Named places in the engine where a test can make something go wrong.

    RAYMILL_FAULT="after_forward:kill:rank=1:step=17"   what goes wrong, several separated by commas
    RAYMILL_FAULT=count                                 nothing; each pass of a point is written down instead
    RAYMILL_FAULT_FOLDER=FOLDER                         where it is kept what has happened

Every process of a run inherits the environment, so any of them can be hit. A fault happens once, also over restarts; only
`slow` happens at each pass. Without RAYMILL_FAULT a point is one look at a variable of this module.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTS = {
    "driver_start": "the driver holds the run, and has started nothing",
    "ray_started": "Ray runs, training does not",
    "before_summary": "training is over, the summary is not written",
    "after_summary": "the summary is written, the last event is not",
    "worker_start": "Ray Train has called a worker",
    "run_taken": "rank 0 has numbered the attempt",
    "restored": "the state is that of the checkpoint",
    "checkpoint_put_aside": "a checkpoint is set aside for one of the same step",
    "before_forward": "a batch is there",
    "after_forward": "the loss is there",
    "after_backward": "gradients are there, summed over ranks",
    "after_optimizer": "the weights have changed",
    "step_done": "the step is counted, a checkpoint of it not begun",
    "evaluation_batch": "before a rank's part of a validation batch",
    "epoch_end": "an epoch's evaluation is over, its checkpoint not begun",
    "before_commit": "rank 0's writing thread has a snapshot",
    "checkpoint_file_written": "a file of a checkpoint is written, not flushed; path: the file",
    "before_checksums": "the files are written, their manifest is not",
    "before_rename": "all is on disk, under the name of the stage",
    "after_rename": "all is on disk, under the final name",
    "before_pointer": "the pointer is to be replaced next",
    "after_pointer": "the pointer is replaced; path: a file of the checkpoint",
    "before_remove_old": "an old checkpoint is to be removed next",
    "after_commit": "the checkpoint is safe, its event is not written",
    "before_read": "a reading task is to read a window",
    "after_transform": "a reading task has read and transformed a window",
    "before_mlflow_call": "the tracking process is to send metrics",
    "after_mlflow_call": "MLflow has the metrics, the tracking process has not noted it",
    "mlflow_run_made": "MLflow has a new run, the tracking process has not noted it",
}
"""Every point, and what has happened where it is passed."""

KINDS = ("kill", "stop", "raise", "delay", "slow", "disk_full", "corrupt", "no_memory", "hog", "fill_store", "clock")
PLACE = ("rank", "step", "attempt")

HOG_BYTES = 64 * 2**20
HOG_INTERVAL_S = 0.05

_here: dict[str, int] = {}


@dataclass(frozen=True)
class Fault:
    """One thing that is to go wrong.

    Attributes:
        number: its place in RAYMILL_FAULT.
        point: where.
        kind: what, one of KINDS.
        place: rank, step, attempt: where these are given, it happens only there.
        hit: at which pass within a process that is in that place, from 1.
        seconds: for `delay` and `slow`, and how far `clock` sets this process's clock back.
    """

    number: int
    point: str
    kind: str
    place: dict[str, int]
    hit: int = 1
    seconds: float = 1.0


def parse(text: str) -> list[Fault]:
    """The faults of RAYMILL_FAULT.

    Raises:
        ValueError: a point, kind or option that is none.
    """
    faults = []
    for number, part in enumerate(text.split(",")):
        point, kind, *options = part.split(":")
        values = dict(option.split("=", 1) for option in options)
        unknown = values.keys() - {*PLACE, "hit", "seconds"}
        if point not in POINTS or kind not in KINDS or unknown:
            raise ValueError(f"RAYMILL_FAULT: {part!r} is not POINT:KIND[:rank=][:step=][:attempt=][:hit=][:seconds=]")
        place: dict[str, int] = {name: int(values[name]) for name in PLACE if name in values}
        faults.append(Fault(number, point, kind, place, int(values.get("hit", 1)), float(values.get("seconds", 1))))
    return faults


class Armed:
    """The faults that may still happen in this process."""

    def __init__(self, text: str, folder: Path) -> None:
        self._folder = folder
        self._counting = text == "count"
        self._faults = [] if self._counting else parse(text)
        self._passes = [0] * len(self._faults)

    def passed(self, point: str, path: Path | None) -> None:
        """Let happen what is to happen here."""
        if self._counting:
            self._note("passes.jsonl", {"point": point})
        for fault in self._faults:
            if fault.point != point or any(_here.get(name) != value for name, value in fault.place.items()):
                continue
            self._passes[fault.number] += 1
            if fault.kind == "slow":
                time.sleep(fault.seconds)
            elif self._passes[fault.number] >= fault.hit and self._is_first(fault):
                _let_happen(fault, path)

    def _is_first(self, fault: Fault) -> bool:
        # Making a file succeeds in one process only.
        try:
            os.close(os.open(self._folder / f"fired-{fault.number}", os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        self._note("fired.jsonl", {"point": fault.point, "fault": fault.kind, "time_s": time.time()})
        return True

    def _note(self, name: str, values: dict[str, Any]) -> None:
        line = json.dumps({**values, "pid": os.getpid(), **_here}) + "\n"
        file = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)


def _let_happen(fault: Fault, path: Path | None) -> None:
    where = f"fault point {fault.point}"
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "raise":
        raise RuntimeError(f"made to fail at {where}")
    elif fault.kind == "delay":
        time.sleep(fault.seconds)
    elif fault.kind == "disk_full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)
    elif fault.kind == "no_memory":
        import torch

        raise torch.OutOfMemoryError(f"CUDA out of memory, made to fail at {where}")
    elif fault.kind == "hog":
        _take(lambda: b"\1" * HOG_BYTES)
    elif fault.kind == "fill_store":
        import ray

        _take(lambda: ray.put(b"\1" * HOG_BYTES))
    elif fault.kind == "clock":
        real = time.time
        time.time = lambda: real() - fault.seconds
    elif fault.kind == "corrupt":
        if path is None:
            raise ValueError(f"{where} has no file to corrupt")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)


def _take(more: Callable[[], object]) -> None:
    """Take more and more, until it is refused or something ends this process."""
    taken = []
    while True:
        taken.append(more())
        time.sleep(HOG_INTERVAL_S)


_armed: Armed | None = None
if os.environ.get("RAYMILL_FAULT"):
    _armed = Armed(os.environ["RAYMILL_FAULT"], Path(os.environ["RAYMILL_FAULT_FOLDER"]))


def here(**place: int) -> None:
    """Say where this process is: rank, step, attempt."""
    if _armed is not None:
        _here.update(place)


def point(name: str, path: Path | None = None) -> None:
    """Pass a point; `path` is a file that `corrupt` may damage."""
    if _armed is not None:
        _armed.passed(name, path)
