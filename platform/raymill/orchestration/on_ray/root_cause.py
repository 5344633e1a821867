"""Why a training on Ray failed: the one error of all ranks that explains the others."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator

import ray.exceptions

from raymill import ray_internals
from raymill.errors import RaymillError, WorkerError
from raymill.orchestration import cluster_facts
from raymill.orchestration.on_ray import session_folder
from raymill.orchestration.retry import Cause
from raymill.own_code.traces import tell

LOST = ray_internals.lost_process_errors()

OF_A_COLLECTIVE = re.compile(
    r"gloo/transport/|\bNCCL (error|WARN|operation)|ncclRemoteError|ncclSystemError|ProcessGroup(Gloo|NCCL)|TCPStore"
)
"""What torch's own messages name when a collective fails because another rank is gone."""

ADVICE = re.compile(r"\nFailed to [^\n]* attempts \(total backoff [^\n]*\n(?:[^\n]*S3[^\n]*\n)?To change retry attempts[^\n]*")
"""What Ray Data adds to the words of whatever is raised in its tasks."""


def root_cause(error: Exception) -> RaymillError:
    """The error that explains a failed training: our own kind from whichever rank raised it, else the first that is not
    a consequence of another rank's death."""
    failures: dict[int, BaseException] = dict(getattr(error, "worker_failures", {}))
    for rank in sorted(failures):
        for cause in _causes(failures[rank]):
            # What a task raised comes wrapped in a class that Ray makes of the error's and its own; the error is inside.
            if isinstance(cause, RaymillError) and not isinstance(cause, ray.exceptions.RayError):
                return cause
    for rank in sorted(failures):
        for cause in _causes(failures[rank]):
            if what := ran_out_of(cause):
                text = "".join(traceback.format_exception(failures[rank]))
                words = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
                return WorkerError(f"rank {rank} ran out of {what} It said: {words}", rank, text, Cause.MEMORY)
    lost = [rank for rank in sorted(failures) if any(isinstance(cause, LOST) for cause in _causes(failures[rank]))]
    if lost:
        ranks = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
        text = "".join(traceback.format_exception(failures[lost[0]]))
        return WorkerError(f"{ranks} died, or lost a process that it needs", lost[0], text, Cause.LOST_PROCESS)
    for rank in sorted(failures, key=lambda rank: (_is_consequence(failures[rank]), rank)):
        text = "".join(traceback.format_exception(failures[rank]))
        why = Cause.LOST_PROCESS if _is_consequence(failures[rank]) else Cause.CODE
        # Not what Ray wraps it in, which speaks of Ray's own settings.
        said = next((one for one in _causes(failures[rank]) if not isinstance(one, ray.exceptions.RayError)), failures[rank])
        return WorkerError(f"rank {rank} failed: {ADVICE.sub('', tell(said))}", rank, text, why)
    return WorkerError(f"training failed: {error}", None, "".join(traceback.format_exception(error)), Cause.LOST_PROCESS)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        inner = getattr(seen, "cause", None)
        seen = inner if isinstance(inner, BaseException) else (seen.__cause__ or seen.__context__)


def ran_out_of(error: BaseException) -> str | None:
    """What was refused to a rank or taken by it too much, and what to do; None: nothing. Torch has no name for it on CPUs."""
    if isinstance(error, (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)):
        folder = os.environ[session_folder.VARIABLE] if cluster_facts.address() is None else "Ray on that machine"
        return (
            f"space: Ray's object store is full, and so is the disk of {folder}, where the rest would go. Free some there, "
            "name another disk with TMPDIR, or lower loop.window_rows."
        )
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    refused = ("can't allocate memory", "Memory on the node", "OutOfMemoryError")
    if known or (isinstance(error, (RuntimeError, *LOST)) and any(words in str(error) for words in refused)):
        return (
            "memory. Lower loop.global_batch_rows or loop.window_rows, raise loop.gradient_accumulation_steps, or give the "
            "machine more."
        )
    return None


def _is_consequence(error: BaseException) -> bool:
    """Whether a rank says that another one is gone: in torch's own words, so that no error of a job is taken for it."""
    return isinstance(error, RuntimeError) and OF_A_COLLECTIVE.search(str(error)) is not None
