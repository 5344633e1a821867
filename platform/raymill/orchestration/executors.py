"""Who executes a run: this process, a supervised driver on this machine, or a Ray cluster. All train in the same order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from raymill.config.plan import ClusterFacts
from raymill.orchestration import cluster_facts, in_process, supervisor
from raymill.orchestration.attempts import Show
from raymill.orchestration.prepare import Prepared
from raymill.preflight.process import Look
from raymill.record.folder import RunFolder


@dataclass(frozen=True)
class Executor:
    """One way to execute a run.

    Attributes:
        name: what people call it.
        find_facts: what there is to run on; raises InputError where it cannot be reached.
        execute: trains a prepared run in its folder to the end and returns the summary; the third argument is shown every event,
            the last says, while there is no step yet, whether the job's own code was found wrong.
        preflight: tries the job's own code as long as the context lasts, which gives the last argument of `execute`.
        only_one_worker: whether it has one worker, whatever the job says.
        has_ray_log: whether Ray and the workers print to the run's `ray.log`.
    """

    name: str
    find_facts: Callable[[], ClusterFacts]
    execute: Callable[[RunFolder, Prepared, Show, Look], dict[str, Any]]
    preflight: Callable[[RunFolder, Prepared], AbstractContextManager[Look]]
    only_one_worker: bool = False
    has_ray_log: bool = True


IN_PROCESS = Executor(
    "in this process",
    cluster_facts.local_facts,
    in_process.execute,
    in_process.preflight,
    only_one_worker=True,
    has_ray_log=False,
)
TRIAL = Executor(
    "in a trial of a search",
    cluster_facts.local_facts,
    partial(in_process.execute, deliver=False),
    in_process.preflight,
    only_one_worker=True,
    has_ray_log=False,
)
SUPERVISED = Executor("supervised on this machine", cluster_facts.local_facts, supervisor.supervise, supervisor.preflight)
CLUSTER = Executor("on a Ray cluster", cluster_facts.ask_cluster, supervisor.supervise, supervisor.preflight)


def choose(*, this_process: bool) -> Executor:
    """The executor for a run: this process where asked for, else the cluster that RAY_ADDRESS names, else this machine."""
    if this_process:
        return IN_PROCESS
    return SUPERVISED if cluster_facts.address() is None else CLUSTER
