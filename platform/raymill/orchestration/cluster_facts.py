"""What there is to run on, before anything is started: the cluster that RAY_ADDRESS names, or else this machine.

A cluster is asked in two steps: a plain connection finds out at once where there is none; only then is Ray started to ask it.

python -m raymill.orchestration.cluster_facts   prints the facts of the cluster, in a process that may wait for it and fail
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import psutil

from raymill import ray_internals
from raymill.config.plan import ClusterFacts
from raymill.errors import InputError, Problem

CONNECT_TIMEOUT_S = 120.0
"""For Ray's own connection. A cluster that is busy starting is slow to answer."""

SILENT_TIMEOUT_S = 10.0
"""For the first bytes of whatever listens at the address."""

# What an HTTP/2 client says first, with no settings of its own; Ray speaks gRPC, which is HTTP/2, and answers with its settings.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME_KIND, _SETTINGS = 3, 4
_PORT = re.compile(r"[0-9]{1,5}")

TOLD = "RAYMILL_CLUSTER_FACTS"
"""Environment variable: the facts of the cluster as JSON, where whoever started this process has just asked for them."""

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


UNSAFE_VARIABLES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "RAY_DATA_EXECUTION_CALLBACKS",
    "RAY_TRAIN_CALLBACKS",
)
"""Variables that make Ray run code found in data files, or import code by name."""


def unsafe_variables(variables: Mapping[str, str]) -> list[Problem]:
    """The environment variables that would let data or names run code; raymill does not run with them."""
    return [
        Problem(f"environment variable {name}", "set", "not set: it lets data or names run code", f"Run `unset {name}`.")
        for name in UNSAFE_VARIABLES
        if name in variables
    ]


def address() -> str | None:
    """The cluster to run on, from RAY_ADDRESS; None: a Ray of our own."""
    named = os.environ.get("RAY_ADDRESS", "")
    return None if named in ("", "local") else named


def ask_cluster() -> ClusterFacts:
    """What the cluster that RAY_ADDRESS names has now.

    Raises:
        InputError: when the cluster cannot be reached, or lets in whoever asks.
    """
    if told := os.environ.get(TOLD):
        return ClusterFacts(**json.loads(told))
    silence = why_no_ray(address() or "", encrypted=os.environ.get("RAY_USE_TLS", "0") != "0")
    if problems := [*_token_problems(os.environ), *([_unreachable(silence)] if silence else [])]:
        raise InputError(problems)
    asked = [sys.executable, "-P", "-m", "raymill.orchestration.cluster_facts"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=CONNECT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError([_unreachable(f"no answer within {CONNECT_TIMEOUT_S:g} s")]) from error
    found = done.stdout.strip().splitlines()[-1:] or ["{}"]
    record = json.loads(found[0]) if done.returncode == 0 else {}
    if "num_cpus" in record:
        return ClusterFacts(**record)
    if record.get("open"):
        fix = "Start it with RAY_AUTH_MODE=token, or set RAY_AUTH_MODE=disabled to say that its network is closed."
        found_there = "a cluster that runs code for whoever can reach it"
        raise InputError([Problem("environment variable RAY_ADDRESS", found_there, "a cluster that asks for a token", fix)])
    raise InputError([_unreachable((done.stderr.strip().splitlines() or ["no answer"])[-1])])


def why_no_ray(named: str, timeout_s: float = SILENT_TIMEOUT_S, *, encrypted: bool = False) -> str | None:
    """Why there can be no Ray at an address, found out by a plain connection; None: there may well be one.

    Args:
        named: host:port, also with ray:// before it. "auto" is left to Ray.
        timeout_s: to wait for who does not answer.
        encrypted: whether TLS is spoken there, so that only the connection itself tells something.
    """
    host, _, port = named.removeprefix("ray://").rpartition(":")
    if named == "auto":
        return None
    if not host or not _PORT.fullmatch(port) or int(port) > 65535:
        return "no host:port"
    deadline_s = time.monotonic() + timeout_s
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_s) as connection:
            connection.settimeout(max(0.1, deadline_s - time.monotonic()))
            if encrypted:
                return None
            connection.sendall(_GREETING)
            answer = connection.recv(9)
    except ConnectionRefusedError:
        return "the connection is refused: nothing listens there"
    except socket.gaierror as error:
        return f"an unknown host: {error.strerror}"
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except OSError as error:
        return f"no connection: {error}"
    is_ray = len(answer) > _FRAME_KIND and answer[_FRAME_KIND] == _SETTINGS
    return None if is_ray else "what listens there does not speak as Ray does; is it another port of the cluster?"


def _token_problems(variables: Mapping[str, str]) -> list[Problem]:
    """What is wrong with how the user wants to identify himself to a cluster."""
    mode = variables.get("RAY_AUTH_MODE", "token").lower()
    named = variables.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if mode == "disabled" or named or (Path.home() / ".ray" / "auth_token").is_file():
        return []
    fix = "Set RAY_AUTH_TOKEN_PATH to the file with the cluster's token, or RAY_AUTH_MODE=disabled if it has none."
    return [Problem("environment variable RAY_AUTH_TOKEN", "not set", "the token of the cluster that RAY_ADDRESS names", fix)]


def _unreachable(why: str) -> Problem:
    fix = "Run on a machine of the cluster, with its token in RAY_AUTH_TOKEN; or unset RAY_ADDRESS to use this machine alone."
    return Problem("environment variable RAY_ADDRESS", f"{address()!r}: {why}", "host:port of a running Ray cluster", fix)


def visible_gpus(installed: int, visible: str | None) -> int:
    """How many GPUs a process may use.

    Args:
        installed: on this machine.
        visible: CUDA_VISIBLE_DEVICES: numbers or identifiers, separated by commas; CUDA stops at the first that is none.
            None: not set, so all.
    """
    if visible is None:
        return installed
    named: list[str] = []
    for name in (part.strip() for part in visible.split(",")):
        if name in named:
            # CUDA shows none at all where one is named twice.
            return 0
        if not name.startswith(("GPU-", "MIG-")) and not (name.isdigit() and int(name) < installed):
            break
        named.append(name)
    return min(len(named), installed) if not any(name.startswith("MIG-") for name in named) else len(named)


def local_facts() -> ClusterFacts:
    """What this machine has, as an embedded Ray would offer it."""
    installed = len(list(NVIDIA_GPUS.glob("*"))) if NVIDIA_GPUS.is_dir() else 0
    return ClusterFacts(
        num_cpus=float(len(os.sched_getaffinity(0))),
        num_gpus=float(visible_gpus(installed, os.environ.get("CUDA_VISIBLE_DEVICES"))),
        memory_bytes=psutil.virtual_memory().total,
    )


# ---------------------------------------------------------------- asking a cluster


def main() -> int:
    """Print the facts of the cluster that RAY_ADDRESS names as JSON, or that it is open to everybody."""
    named = address() or "auto"
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "disabled":
        if _lets_anybody_in(named):
            print(json.dumps({"open": True}))
            return 0
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    ray.init(address=named, log_to_driver=False, logging_level=logging.ERROR)
    facts = facts_of(ray.cluster_resources())  # type: ignore[no-untyped-call]
    ray.shutdown()
    print(json.dumps(asdict(facts)))
    return 0


def facts_of(resources: Mapping[str, float]) -> ClusterFacts:
    """What a cluster has, by the names that Ray has for it."""
    there = {"num_cpus": resources.get("CPU", 0.0), "num_gpus": resources.get("GPU", 0.0)}
    return ClusterFacts(**there, memory_bytes=psutil.virtual_memory().total, is_shared=True)


def _lets_anybody_in(named: str) -> bool:
    """Whether the cluster answers somebody without a token."""
    nobody = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    asked = [sys.executable, "-P", "-c", ray_internals.ASK_WITHOUT_TOKEN, named]
    done = subprocess.run(asked, env=nobody | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, check=False)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
