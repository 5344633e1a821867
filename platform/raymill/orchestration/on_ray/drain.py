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

from raymill import ray_internals
from raymill.orchestration.on_ray.group import Group
from raymill.orchestration.on_ray.turn import Turn
from raymill.record.events import DrainNoticed, append_event

LOOK_INTERVAL_S = 1.0


@dataclass
class DrainNotice:
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
def watched(turn: Turn, group: Group) -> Iterator[DrainNotice]:
    """While the context lasts, ask the workers to save and end once a node that they use is to leave.

    Args:
        turn: of the driver; before it has come there is nothing to save.
        group: the workers.
    """
    notice, over = DrainNotice(), threading.Event()
    thread = threading.Thread(target=_watch, args=(turn, group, notice, over), name="drain", daemon=True)
    thread.start()
    try:
        yield notice
    finally:
        over.set()
        thread.join()


def _watch(turn: Turn, group: Group, notice: DrainNotice, over: threading.Event) -> None:
    import ray

    here = ray.get_runtime_context().get_node_id()
    while not over.wait(LOOK_INTERVAL_S):
        if not turn.has_come:
            continue
        folder = turn.known_folder
        deadlines_ms = ray_internals.draining_nodes()
        used = deadlines_ms.keys() & (ray_internals.nodes_in_use() | {here}) if deadlines_ms else set()
        if used and not notice.nodes:
            notice.nodes = tuple(sorted(used))
            notice.goes_on = (
                here not in used and room(ray_internals.node_resources(), deadlines_ms, group.each) >= group.min_workers
            )
            first_ms = min((deadlines_ms[node] for node in used if deadlines_ms[node]), default=0)
            left_s = round(first_ms / 1000 - time.time(), 1) if first_ms else None
            append_event(folder, DrainNoticed(nodes=notice.nodes, left_s=left_s, goes_on=notice.goes_on))
        if notice.nodes:
            # Again and again: workers that were just starting clear it.
            folder.handover_request.touch()
