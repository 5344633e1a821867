"""The faults: how each is provoked, and what must come of it. A new fault is one more `Case` in `CASES`.

The numbers are those of the forty faults that raymill is measured by; `NOT_YET` says why some of them are missing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from faults.harness import Live, Provoke, interrupt, kill, lock_store, pause, server_gone
from raymill.checkpoint.directory import POINTER, read_pointer
from raymill.data.sources import write_parquet
from raymill.record.folder import RunFolder
from raymill.task import Field

Prepare = Callable[[Live], None]

OFTEN = ("checkpoint.every_steps=7", "loop.record_order=true", "retry.lost_processes=20")
BLOBS = (
    "smoke",
    "data.num_rows=600",
    "loop.epochs=2",
    "loop.global_batch_rows=30",
    "loop.window_rows=50",
    "optimizer.lr=0.003",
    *OFTEN,
)
"""40 steps of a small network; it learns slowly, so that every row leaves its mark in the weights."""

DIGITS = ("mnist", "model.width=8", "loop.epochs=1", "register=null", *OFTEN)
"""38 steps with batch norm, dropout, augmentation and a schedule."""

OWN = ("mnist", "data.root={home}/own", "model.width=4", "loop.epochs=1", "loop.global_batch_rows=30", "register=null")
"""240 made-up digits in four Parquet files, which a case may damage."""

SPOILED_ROWS = (("rows.used", 1140), ("rows.skipped", 60), ("rows.remaining", 0))
"""Of BLOBS, when the batch with the row that is not a number is left out in both epochs."""

SLOWED = "before_forward:slow:rank=0:seconds=0.25"
"""Gives what comes from outside time to hit a step."""

SLOWER = "before_forward:slow:rank=0:seconds=1"
"""The same where it takes Ray ten seconds to notice."""


@dataclass(frozen=True)
class Play:
    """One command and what is to come of it.

    Attributes:
        verb: "train" the case's job, "resume" its run, or "check" its job.
        fault: RAYMILL_FAULT.
        provoke: what comes from outside.
        prepare: called before the command.
        exit_code: that it must end with.
        says: pattern that must be in what it prints.
        workers: None: the case's.
        attempts: worker groups that must have started since the run began; None: any number.
        orphans: whether processes may outlive the command; they are waited for.
        summary: dotted names of its summary, and the values they must have.
    """

    verb: str = "train"
    fault: str = ""
    provoke: Provoke | None = None
    prepare: Prepare | None = None
    exit_code: int = 0
    says: str = ""
    workers: int | None = None
    attempts: int | None = None
    orphans: bool = False
    summary: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        number: among the forty.
        name: of the fault.
        how: it is provoked.
        plays: commands, one after the other on the same state folder.
        job: a job's name and what is set in it.
        workers: how many.
        same: what must be as in a run that nothing happened to: "weights" and order, "order", or "" for nothing.
        quick: whether `make test` runs it too.
        mounts: whether it needs the right to mount.
    """

    number: int
    name: str
    how: str
    plays: tuple[Play, ...]
    job: tuple[str, ...] = BLOBS
    workers: int = 2
    same: str = "weights"
    quick: bool = False
    mounts: bool = False


# ---------------------------------------------------------------- data


def own_digits(folder: Path, rows: int = 240) -> Path:
    """Make the data set of OWN in a folder; returns that of its training files."""
    generator = np.random.default_rng(0)
    schema = {"image": Field("uint8", (28, 28)), "label": Field("int64", classes=10)}
    for split, count, shards in (("train", rows, 4), ("validation", 60, 1)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count)
        write_parquet(folder / "own" / split, {"image": images, "label": labels}, schema, num_shards=shards, row_group_rows=30)
    return folder / "own" / "train"


def make_digits(place: Live) -> None:
    own_digits(place.home)


def shard(place: Live) -> Path:
    """The third training file of a fresh data set."""
    return sorted(own_digits(place.home).glob("*.parquet"))[2]


def cut_shard(place: Live) -> None:
    file = shard(place)
    os.truncate(file, file.stat().st_size // 2)


def flip_page(file: Path) -> None:
    """Invert 40 bytes of the second row group's first page."""
    content = bytearray(file.read_bytes())
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content[start + 2000 : start + 2040] = bytes(byte ^ 0xFF for byte in content[start + 2000 : start + 2040])
    file.write_bytes(content)


def flip_shard(place: Live) -> None:
    flip_page(shard(place))


def empty_folder(place: Live) -> None:
    for file in own_digits(place.home).glob("*.parquet"):
        file.unlink()


def rewrite_shard(place: Live, change: Callable[[pa.Table], pa.Table]) -> None:
    file = shard(place)
    pq.write_table(change(pq.read_table(file)), file)


def relabel(table: pa.Table, labels: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index("label"), "label", labels)


def hostile_names(place: Live) -> None:
    own_digits(place.home)
    (place.home / "own").rename(place.home / HOSTILE)


HOSTILE = "own \N{SNOWMAN} 100% a?b#c=d 'q' e\N{COMBINING ACUTE ACCENT}"


def bad_yaml(place: Live) -> None:
    lines = (
        "name: x",
        "nmae: y",
        "task: 5",
        "pipeline: pipelines.synthetic:blobs",
        "loop: {epochs: two, sede: 1}",
        "optimizer: {kind: SDG, lr: fast}",
    )
    (place.home / "bad.yaml").write_text("\n".join(lines))


# ---------------------------------------------------------------- checkpoints and disks


def limit_memory(place: Live) -> None:
    """Let Ray end processes once this much more than now is in use."""
    memory = psutil.virtual_memory()
    place.settings["RAY_memory_usage_threshold"] = f"{(memory.total - memory.available + ROOM_BYTES) / memory.total:.3f}"


ROOM_BYTES = 6 * 2**30
"""A run with two workers takes about half of it."""


def run_of(place: Live) -> RunFolder:
    folder = place.folder
    assert folder is not None, "the run has no folder"
    return folder


def cut_pointer(place: Live) -> None:
    os.truncate(run_of(place).checkpoints / POINTER, 20)


def flip_weights(place: Live) -> None:
    checkpoints = run_of(place).checkpoints
    pointer = read_pointer(checkpoints)
    assert pointer is not None
    file = checkpoints / pointer.latest / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def touch_data(place: Live) -> None:
    file = sorted((place.home / "own" / "train").glob("*.parquet"))[1]
    table = pq.read_table(file)
    pq.write_table(relabel(table, pa.array([0] * table.num_rows)), file)


def mount(options: str) -> Prepare:
    """Mount memory as the folder of checkpoints, or mount it again with other options. Needs root."""

    def prepare(place: Live) -> None:
        folder = run_of(place).checkpoints
        folder.mkdir(exist_ok=True)
        again = "remount," if folder.is_mount() else ""
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"{again}{options}", "tmpfs", str(folder)], check=True)

    return prepare


def mount_scratch(place: Live) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place.scratch)], check=True)


def mount_while_running(options: str, step: int = 0) -> Provoke:
    """As `mount`, once the run has its folder and has made a step."""

    def provoke(place: Live) -> bool:
        if place.folder is None or place.step() < step:
            return False
        mount(options)(place)
        return True

    return provoke


def both(first: Provoke, second: Provoke) -> Provoke:
    """One after the other."""
    done: list[bool] = []

    def provoke(place: Live) -> bool:
        if not done:
            if first(place):
                done.append(True)
            return False
        return second(place)

    return provoke


def can_mount() -> bool:
    """Whether this process may mount."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


# ---------------------------------------------------------------- a second command


def resume_meanwhile(step: int = 8) -> Provoke:
    """Resume the run while it is trained: this must be refused with the owner's number, and change nothing."""
    second: list[subprocess.Popen[bytes]] = []

    def provoke(place: Live) -> bool:
        if not second:
            if place.step() < step:
                return False
            command = ["train", "--resume", run_of(place).run_id, "--json"]
            second.append(place.start(command))
        if second[0].poll() is None:
            return False
        text = place.printed(place.num_commands - 1).get("message", "")
        refused = second[0].returncode == 1 and "process" in text and "being trained" in text
        if not refused:
            raise AssertionError(f"the second command ended with {second[0].returncode}: {text[-300:]}")
        return True

    return provoke


STOPPED = Play(provoke=interrupt(12), fault=SLOWED, exit_code=3, says="--resume")


def check(prepare: Prepare | None, says: str, exit_code: int = 2) -> tuple[Play, ...]:
    return (Play("check", prepare=prepare, exit_code=exit_code, says=says),)


def survives(fault: str, provoke: Provoke | None = None, attempts: int | None = 2) -> tuple[Play, ...]:
    return (Play(fault=fault, provoke=provoke, attempts=attempts),)


def ends(fault: str, says: str, prepare: Prepare | None = None) -> tuple[Play, ...]:
    """A run that this fault ends at its first attempt, for trying again would not help."""
    return (Play(fault=fault, prepare=prepare, exit_code=1, says=says, attempts=1),)


def kills(*places: str) -> str:
    """A kill at each of these, one attempt after the other."""
    return ",".join(f"{place}:kill" for place in places)


CASES = [
    Case(1, "truncated Parquet file", "cut in half", check(cut_shard, "part-00002"), OWN, same="", quick=True),
    Case(
        2,
        "bit-flipped Parquet page",
        "40 bytes of a page inverted",
        (Play(prepare=flip_shard, exit_code=1, says=r"part-00002.*row group 1"),),
        OWN,
        same="",
    ),
    *[
        Case(
            2,
            "bit-flipped Parquet page",
            f"as above, with bad_rows.policy={policy}",
            (
                Play(
                    prepare=flip_shard,
                    says=r"30 bad rows left out.*part-00002.*part 1",
                    summary=(("bad_rows.distinct", 30), ("rows.used", 210), ("rows.skipped", 30), ("rows.remaining", 0)),
                ),
            ),
            (*OWN, f"bad_rows.policy={policy}", "bad_rows.budget=30"),
            same="",
        )
        for policy in ("skip", "quarantine")
    ],
    Case(5, "empty data set", "folder without files", check(empty_folder, "no file that matches"), OWN, same="", quick=True),
    Case(
        6,
        "fewer rows than workers",
        "1 row, 2 workers",
        check(None, r"1 row|1 .*2 "),
        (*BLOBS, "data.num_rows=1"),
        same="",
        quick=True,
    ),
    Case(
        7,
        "rows do not divide",
        "101 rows, batches of 30, 2 workers; a worker killed at step 6",
        survives("after_backward:kill:rank=1:step=6"),
        (*BLOBS, "data.num_rows=101", "checkpoint.every_steps=3"),
    ),
    Case(
        8,
        "missing column",
        "one file without its labels",
        check(partial(rewrite_shard, change=lambda table: table.drop_columns(["label"])), r"part-00002.*label"),
        OWN,
        same="",
        quick=True,
    ),
    Case(
        9,
        "wrong type in one file",
        "labels as text",
        check(partial(rewrite_shard, change=lambda table: relabel(table, table["label"].cast("string"))), "part-00002"),
        OWN,
        same="",
        quick=True,
    ),
    Case(
        10,
        "schema drift",
        "one file has labels that are missing",
        check(partial(rewrite_shard, change=lambda table: relabel(table, pa.nulls(table.num_rows, "int64"))), "part-00002"),
        OWN,
        same="",
        quick=True,
    ),
    Case(
        11,
        "more classes than the head has",
        "label 10 of 10 classes",
        check(partial(rewrite_shard, change=lambda table: relabel(table, pa.array([10] * table.num_rows))), "part-00002"),
        OWN,
        same="",
        quick=True,
    ),
    Case(
        12,
        "loss is not a number",
        "learning rate 1e30",
        (Play(exit_code=1, says=r"step \d+"),),
        (*BLOBS, "optimizer.lr=1e30"),
        same="",
    ),
    Case(
        12,
        "row that is not a number, its batch left out",
        "one row with NaN, loop.on_nan: skip; a worker killed at step 17 and at step 37",
        (
            Play(
                fault="after_backward:kill:rank=1:step=17,after_backward:kill:rank=0:step=37",
                attempts=3,
                summary=SPOILED_ROWS,
            ),
        ),
        (*BLOBS, "data.num_spoiled=1", "loop.on_nan=skip"),
    ),
    Case(
        12,
        "row that is not a number, gone back to the checkpoint before it",
        "one row with NaN in each of two epochs, loop.on_nan: rollback",
        (Play(attempts=3, says="numbers after step", summary=SPOILED_ROWS),),
        (*BLOBS, "data.num_spoiled=1", "loop.on_nan=rollback"),
        same="",
    ),
    Case(
        13,
        "score metric missing",
        "checkpoint.metric that is not measured",
        (Play(exit_code=2, says="expected one of validation/"),),
        (*BLOBS, "checkpoint.metric=validation/nothing"),
        same="",
    ),
    Case(
        14,
        "worker takes all memory",
        "rank 1 takes more and more from step 5 on; Ray ends processes above a limit",
        ends("before_forward:hog:rank=1:step=5", r"out of memory.*Lower loop", limit_memory),
        same="",
    ),
    Case(
        15,
        "accelerator out of memory",
        "torch's error of it raised on rank 1 in step 5; no GPU here",
        ends("before_forward:no_memory:rank=1:step=5", r"rank 1 ran out of memory.*Lower loop"),
        same="",
    ),
    Case(
        16,
        "disk full while saving, once",
        "ENOSPC before the checksums of the second checkpoint",
        survives("before_checksums:disk_full:hit=2"),
    ),
    Case(
        16,
        "disk full while saving",
        "checkpoints on 48 KiB of memory; then more room, resumed",
        (
            Play(fault=SLOWED, provoke=mount_while_running("size=48k"), exit_code=1, says="No space left"),
            Play("resume", prepare=mount("size=10m")),
        ),
        mounts=True,
    ),
    Case(
        17,
        "no room for what does not fit into Ray's object store",
        "temporary folder on 64 MiB of memory, rank 1 puts more and more into the store from step 5 on",
        ends("before_forward:fill_store:rank=1:step=5", r"rank 1 ran out of space.*disk of /tmp.*TMPDIR", mount_scratch),
        same="",
        mounts=True,
    ),
    Case(
        18,
        "storage becomes read-only",
        "remounted at step 12; then writable, resumed",
        (
            Play(
                fault=SLOWED,
                provoke=both(mount_while_running("size=10m"), mount_while_running("ro", step=12)),
                exit_code=1,
                says="Read-only",
            ),
            Play("resume", prepare=mount("rw")),
        ),
        mounts=True,
    ),
    Case(
        19,
        "killed while a checkpoint is written",
        "SIGKILL at 8 boundaries of a commit, one after the other",
        survives(
            kills(
                "checkpoint_file_written",
                "before_checksums",
                "before_rename",
                "after_rename",
                "before_pointer",
                "after_pointer",
                "before_remove_old",
                "after_commit",
            ),
            attempts=9,
        ),
    ),
    Case(
        20,
        "pointer to checkpoints damaged",
        "cut after an interruption, resumed",
        (STOPPED, Play("resume", prepare=cut_pointer)),
    ),
    Case(
        21,
        "checkpoint damaged",
        "one bit of its weights, after an interruption, resumed",
        (STOPPED, Play("resume", prepare=flip_weights, says="passed over")),
    ),
    *[
        Case(
            22,
            "worker killed in a step",
            f"SIGKILL of rank {rank} {point.replace('_', ' ')}, step 17",
            survives(f"{point}:kill:rank={rank}:step=17"),
            workers=workers,
            quick=workers == 2,
        )
        for workers, rank, point in ((1, 0, "after_forward"), (2, 0, "after_optimizer"), (3, 1, "after_backward"))
    ],
    *[
        Case(
            22,
            "worker killed in a step",
            "batch norm, dropout, augmentation; SIGKILL after backward, step 17",
            survives("after_backward:kill:rank=0:step=17"),
            DIGITS,
            workers=workers,
        )
        for workers in (1, 2, 3)
    ],
    Case(
        23,
        "two workers killed, again in recovery, and at the epoch's end",
        "SIGKILL of ranks 0 and 1 at step 10, rank 0 while restoring, rank 1 at the epoch's end and in evaluation",
        survives(
            "after_forward:kill:rank=0:step=10:attempt=1,after_forward:kill:rank=1:step=10:attempt=1,"
            "restored:kill:rank=0:attempt=2,epoch_end:kill:rank=1:attempt=3,evaluation_batch:kill:rank=1:attempt=4:step=40",
            attempts=None,
        ),
    ),
    Case(24, "train controller killed", "SIGKILL from outside", survives(SLOWED, kill("controller"))),
    Case(25, "driver killed", "SIGKILL from outside", survives(SLOWED, kill("driver"))),
    Case(
        25,
        "driver killed at its ends",
        "SIGKILL at its start, when Ray is up, before and after the summary",
        survives(kills("driver_start", "ray_started", "before_summary", "after_summary"), attempts=None),
        workers=1,
    ),
    Case(
        25,
        "driver killed between its summary and its last event",
        "SIGKILL without a budget for it, then resumed",
        (Play(fault="after_summary:kill", exit_code=1, says="SIGKILL"), Play("resume")),
        (*BLOBS, "retry.lost_processes=0"),
        workers=1,
    ),
    Case(
        25,
        "command killed",
        "SIGKILL of the command line; the run goes on without it",
        (Play(fault=SLOWED, provoke=interrupt(12, signal.SIGKILL), exit_code=-9, attempts=1, orphans=True),),
    ),
    Case(26, "raylet killed", "SIGKILL from outside", survives(SLOWER, kill("raylet", step=6))),
    Case(27, "Ray's head killed", "SIGKILL of gcs_server", survives(SLOWED, kill("gcs"), attempts=None)),
    Case(28, "coordinator of the stream killed", "SIGKILL from outside", survives(SLOWED, kill("coordinator"))),
    Case(
        28,
        "reading task killed",
        "SIGKILL before and after a window is read",
        survives("before_read:kill,after_transform:kill:hit=3", attempts=None),
    ),
    Case(
        29,
        "tracking process killed",
        "SIGKILL when MLflow has made the run, and before and after metrics are sent",
        survives(kills("mlflow_run_made", "before_mlflow_call", "after_mlflow_call") + "," + SLOWED, attempts=1),
    ),
    Case(
        29,
        "MLflow server killed",
        "SIGKILL of the server at step 4, another one 10 s later",
        (Play(fault=SLOWED, prepare=Live.serve, provoke=server_gone(signal.SIGKILL, 10), attempts=1),),
    ),
    Case(
        30,
        "MLflow server stopped for 60 s",
        "SIGSTOP of the server at step 4, SIGCONT",
        (Play(fault=SLOWED, prepare=Live.serve, provoke=server_gone(signal.SIGSTOP, 60), attempts=1),),
    ),
    Case(30, "tracking stopped for 20 s", "SIGSTOP, then SIGCONT", survives(SLOWED, pause("tracking", 20, step=4), attempts=1)),
    Case(31, "SQLite locked for 30 s", "an exclusive transaction", survives(SLOWED, lock_store(30), attempts=1)),
    Case(
        32,
        "SIGTERM and SIGINT, 3 workers",
        "both, each resumed",
        (
            STOPPED,
            replace(STOPPED, verb="resume", provoke=interrupt(26, signal.SIGINT)),
            Play("resume", attempts=3),
        ),
        workers=3,
    ),
    Case(
        32,
        "SIGTERM of the driver alone",
        "from outside; then resumed",
        (
            Play(fault=SLOWED, provoke=kill("driver", number=signal.SIGTERM), exit_code=3, says="--resume"),
            Play("resume", attempts=2),
        ),
    ),
    Case(32, "SIGTERM of a worker alone", "from outside", survives(SLOWED, kill("worker", number=signal.SIGTERM), attempts=2)),
    Case(
        33,
        "hung rank",
        "SIGSTOP of rank 1, step 17; loop.stall_timeout_s 15",
        survives("after_forward:stop:rank=1:step=17"),
        (*BLOBS, "loop.stall_timeout_s=15"),
    ),
    Case(
        34,
        "slow rank",
        "rank 1 waits 0.3 s a step",
        (Play(fault="before_forward:slow:rank=1:seconds=0.3", attempts=1, says=r"rank 1 computes \d.* slower"),),
    ),
    Case(
        35,
        "clock stepped back",
        "by an hour: in the driver at its start, on rank 0 at step 11; a worker killed at step 17",
        survives(
            "before_forward:clock:rank=0:step=11:seconds=3600,after_forward:kill:rank=1:step=17,driver_start:clock:seconds=3600"
        ),
    ),
    Case(
        36,
        "other numbers of workers",
        "2, then 1, then 3 workers in one run",
        (
            STOPPED,
            replace(STOPPED, verb="resume", workers=1, provoke=interrupt(24)),
            Play("resume", workers=3, attempts=3),
        ),
        same="order",
    ),
    Case(
        36,
        "other numbers of workers, strict",
        "2, then 1, then 3 workers in one run with loop.strict",
        (
            STOPPED,
            replace(STOPPED, verb="resume", workers=1, provoke=interrupt(24)),
            Play("resume", workers=3, attempts=3),
        ),
        (*BLOBS, "loop.strict=true"),
    ),
    Case(
        37,
        "data changed before a resume",
        "labels of one file written again",
        (
            replace(STOPPED, prepare=make_digits, provoke=interrupt(3)),
            Play("resume", prepare=touch_data, exit_code=2, says="part-00001"),
        ),
        OWN,
        same="",
    ),
    Case(
        38,
        "run resumed while it is trained",
        "a second command at step 8: refused, the first goes on",
        survives(SLOWED, resume_meanwhile(), attempts=1),
    ),
    Case(
        39,
        "bad YAML",
        "unknown, doubled and mistyped keys",
        check(bad_yaml, r"bad\.yaml:\d+"),
        ("{home}/bad.yaml",),
        same="",
        quick=True,
    ),
    Case(
        40,
        "hostile names",
        "data in a folder with spaces, %, ?, #, quotes and a combining accent",
        (Play(prepare=hostile_names),),
        (*OWN, f"data.root={{home}}/{HOSTILE}"),
        same="",
    ),
]

NOT_YET = {
    3: "no source of image files",
    4: "no source of image files",
}
"""Faults that the platform cannot meet yet, or that cannot be provoked here."""


def arguments(case: Case, play: Play, place: Live) -> list[str]:
    """The command line of a play."""
    workers = play.workers or case.workers
    name, *values = [value.replace("{home}", str(place.home)) for value in case.job]
    if play.verb == "resume":
        return ["train", "--resume", run_of(place).run_id, "--workers", str(workers), "--json"]
    settings = [part for value in values for part in ("--set", value)]
    return [play.verb, name, *settings, *(["--workers", str(workers)] if values else []), "--json"]
