"""Whether the nodes of a cluster are fit for each other: what runs on them, clocks, disks, memory, GPUs, the way between them.

    python -m raymill.cluster.health        looks at every node; a job of Ray's on the head, which prints one JSON object

What is found on each node is data; `differences` says what of it will do harm.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

NODE_TIMEOUT_S = 120.0
PROBE_BYTES = 64 * 2**20
CLOCK_ROUNDS = 5

MOST_SKEW_S = 1.0
LEAST_DISK_GB, LEAST_SHARED_MEMORY_GB = 5.0, 1.0
LEAST_SHARE_OF_BANDWIDTH = 0.3
"""Of the median between two nodes."""

PACKAGES = ("ray", "torch", "pyarrow", "numpy")


def look() -> dict[str, Any]:
    """What there is on the machine of this process."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "host": platform.node(),
        "versions": {"python": platform.python_version(), **versions},
        "disk_free_gb": round(shutil.disk_usage("/tmp").free / 1e9, 1),
        "shared_memory_free_gb": round(shutil.disk_usage("/dev/shm").free / 1e9, 1),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
        "gpus_compute": all(_computes(number) for number in range(len(gpus))),
        "nccl": torch.distributed.is_nccl_available(),
    }


def _computes(gpu: int) -> bool:
    import torch

    ones = torch.ones(256, 256, device=f"cuda:{gpu}")
    return bool((ones @ ones == 256).all())


def differences(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of the nodes will do harm, and what to do, a line each.

    Args:
        nodes: as `main` prints them: name, what `look` found or failed, num_gpus (that Ray offers), skew_s, bandwidth_mb_s.
    """
    found = [f"{one['name']}: {one['failed']}; look at its log, or take it out" for one in nodes if one.get("failed")]
    seen = [one for one in nodes if not one.get("failed")]
    for package in ("python", *PACKAGES):
        versions = {one["name"]: one["versions"][package] for one in seen}
        if len(set(versions.values())) > 1:
            told = ", ".join(f"{name} has {version}" for name, version in versions.items())
            found.append(f"{package}: {told}; install one version on all, or weights and pickles may differ")
    rates = [one["bandwidth_mb_s"] for one in seen if one["bandwidth_mb_s"] is not None]
    usual = statistics.median(rates) if rates else 0.0
    for one in seen:
        name = one["name"]
        if abs(one["skew_s"]) > MOST_SKEW_S:
            found.append(f"{name}: its clock is {one['skew_s']:+.1f} s from the head's; set it by NTP, or events and logs lie")
        if one["disk_free_gb"] < LEAST_DISK_GB:
            found.append(f"{name}: {one['disk_free_gb']:g} GB of disk are free; Ray stops at 95 % full: make room")
        if one["shared_memory_free_gb"] < LEAST_SHARED_MEMORY_GB:
            fix = "give the container more (--shm-size)"
            found.append(f"{name}: {one['shared_memory_free_gb']:g} GB of shared memory are free; rows travel in it: {fix}")
        if len(one["gpus"]) < one["num_gpus"]:
            fix = "look at the driver and CUDA_VISIBLE_DEVICES"
            found.append(f"{name}: torch sees {len(one['gpus'])} GPUs, Ray offers {one['num_gpus']:g}; {fix}")
        if not one["gpus_compute"]:
            found.append(f"{name}: a GPU computes wrongly, or not at all; take it out")
        if one["gpus"] and not one["nccl"]:
            found.append(f"{name}: its torch has no NCCL, which GPUs talk by; install a CUDA build of torch")
        if one["bandwidth_mb_s"] is not None and one["bandwidth_mb_s"] < LEAST_SHARE_OF_BANDWIDTH * usual:
            found.append(f"{name}: {one['bandwidth_mb_s']:.0f} MB/s come to it, usual are {usual:.0f}; look at its link")
    return found


# ---------------------------------------------------------------- on the head


def _clock() -> float:
    return time.time()


def _make() -> Any:
    import numpy as np

    return np.ones(PROBE_BYTES, np.uint8)


def _take(probes: list[Any]) -> float:
    """Seconds that an object of another node takes to come here."""
    import ray

    began = time.perf_counter()
    ray.get(probes[0])
    return time.perf_counter() - began


def main() -> int:
    """Look at every node; print what was found, and what differs, as one line of JSON."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False)
    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node for node in known if node["Alive"]]

    def on(node: Mapping[str, Any], function: Any, *arguments: Any) -> Any:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return ray.remote(function).options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(*arguments)

    asked = [on(node, look) for node in alive]
    nodes: list[dict[str, Any]] = []
    for node, answer in zip(alive, asked, strict=True):
        told: dict[str, Any] = {"name": node["NodeName"], "num_gpus": node["Resources"].get("GPU", 0.0)}
        told |= {"skew_s": 0.0, "bandwidth_mb_s": None}
        try:
            told |= ray.get(answer, timeout=NODE_TIMEOUT_S)
            told["skew_s"] = _skew_s(lambda node=node: ray.get(on(node, _clock), timeout=NODE_TIMEOUT_S))
        except (ray.exceptions.RayError, TimeoutError) as error:
            told["failed"] = f"does not answer: {str(error).splitlines()[0]}"
        nodes.append(told)
    for number, node in enumerate(alive):
        # From the one before, in a ring; each link by itself.
        before = alive[number - 1]
        if node is not before and not nodes[number].get("failed") and not nodes[number - 1].get("failed"):
            probe = on(before, _make)
            ray.wait([probe], fetch_local=False)
            took_s = ray.get(on(node, _take, [probe]), timeout=NODE_TIMEOUT_S)
            nodes[number]["bandwidth_mb_s"] = round(PROBE_BYTES / 1e6 / took_s, 1)
    print(json.dumps({"nodes": nodes, "differences": differences(nodes)}))
    return 0


def _skew_s(ask: Any) -> float:
    """How far another clock is ahead of this one: of several questions, the one that was answered soonest tells best."""
    found = []
    for _ in range(CLOCK_ROUNDS):
        asked_s = time.time()
        there_s = ask()
        answered_s = time.time()
        found.append((answered_s - asked_s, there_s - (asked_s + answered_s) / 2))
    return float(round(min(found)[1], 3))


if __name__ == "__main__":
    sys.exit(main())
