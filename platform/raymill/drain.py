"""Machines that are to leave the cluster: the notice comes some time before, and the run saves and moves on.

Ray hears of it from the cloud that takes a machine back, from its autoscaler, or from `ray drain-node`, and gives such a node
no new work. The workers finish their step and save; then the run goes on where there is room for it, or stops to be resumed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from raymill.home import RunFolder
from raymill.tracking import append_event

LOOK_INTERVAL_S = 1.0


@dataclass
class Leaving:
    """What is known of nodes that are to leave.

    Attributes:
        nodes: ids of those that this run uses; none: no notice.
        goes_on: whether the run has room on those that stay; not so if the driver's own is to leave.
    """

    nodes: tuple[str, ...] = ()
    goes_on: bool = False


def room(nodes: Mapping[str, Mapping[str, float]], leaving: Collection[str], each: Mapping[str, float]) -> int:
    """How many workers fit on the nodes that stay.

    Args:
        nodes: node -> its resources in all.
        leaving: nodes that are to leave.
        each: what a worker needs.
    """
    staying = [has for node, has in nodes.items() if node not in leaving]
    return sum(int(min(has.get(name, 0.0) / amount for name, amount in each.items())) for has in staying)


@contextmanager
def watched(folder: RunFolder, least: int, each: Mapping[str, float]) -> Iterator[Leaving]:
    """While the context lasts, ask the workers to save and end once a node that the run uses is to leave.

    Args:
        folder: of the run.
        least: workers that it needs.
        each: what a worker needs.
    """
    known, over = Leaving(), threading.Event()
    thread = threading.Thread(target=_watch, args=(folder, least, each, known, over), name="drain", daemon=True)
    thread.start()
    try:
        yield known
    finally:
        over.set()
        thread.join()


def _watch(folder: RunFolder, least: int, each: Mapping[str, float], known: Leaving, over: threading.Event) -> None:
    import ray

    here, state = ray.get_runtime_context().get_node_id(), ray._private.state.state
    while not over.wait(LOOK_INTERVAL_S):
        deadlines_ms: dict[str, int] = state.get_draining_nodes()
        used = deadlines_ms.keys() & (_nodes_in_use() | {here}) if deadlines_ms else set()
        if used and not known.nodes:
            known.nodes = tuple(sorted(used))
            known.goes_on = here not in used and room(state.total_resources_per_node(), deadlines_ms, each) >= least
            first_ms = min((deadlines_ms[node] for node in used if deadlines_ms[node]), default=0)
            left_s = round(first_ms / 1000 - time.time(), 1) if first_ms else None
            append_event(folder, {"kind": "drain", "nodes": known.nodes, "left_s": left_s, "goes_on": known.goes_on})
        if known.nodes:
            # Again and again: workers that were just starting clear it.
            folder.handover.touch()


def _nodes_in_use() -> set[str]:
    """The nodes where actors of this process's job live."""
    import ray

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors: dict[str, dict[str, dict[str, str]]] = ray._private.state.actors(job_id=job, actor_state_name="ALIVE")
    return {actor["Address"]["NodeID"] for actor in actors.values()}
