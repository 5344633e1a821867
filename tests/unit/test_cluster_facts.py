"""What there is to run on: the GPUs that CUDA would show, and where the cluster is."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from raymill.config.plan import ClusterFacts
from raymill.orchestration import cluster_facts
from raymill.orchestration.cluster_facts import UNSAFE_VARIABLES, address, local_facts, unsafe_variables, visible_gpus


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 2),
        ("", 0),
        (" ", 0),
        ("-1", 0),
        ("none", 0),
        ("NoDevFiles", 0),
        ("0", 1),
        ("1", 1),
        ("0,1", 2),
        ("1,0", 2),
        (" 0 , 1 ", 2),
        ("1,7", 1),
        ("7,1", 0),
        ("2", 0),
        ("0,-1,1", 1),
        ("0,,1", 1),
        ("0,0", 0),
        ("0,1,0", 0),
        ("GPU-5a1c", 1),
        ("GPU-5a1c,GPU-77e0", 2),
        ("GPU-5a1c,GPU-5a1c", 0),
        ("MIG-5a1c", 1),
        ("MIG-5a1c,MIG-77e0,MIG-90bd", 3),
        ("MIG-GPU-5a1c/3/0", 1),
    ],
)
def test_as_many_gpus_are_visible_as_cuda_shows(visible: str | None, count: int) -> None:
    assert visible_gpus(2, visible) == count


@pytest.mark.parametrize("visible", [None, "", "0", "0,1", "GPU-5a1c"])
def test_a_machine_without_gpus_shows_none(visible: str | None) -> None:
    assert visible_gpus(0, visible) == 0


def test_no_more_gpus_are_visible_than_are_installed() -> None:
    assert visible_gpus(1, "GPU-5a1c,GPU-77e0") == 1


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two, as the driver lists them."""
    folder = tmp_path / "gpus"
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setattr(cluster_facts, "NVIDIA_GPUS", folder)


@pytest.mark.usefixtures("two_gpus")
def test_this_machine_has_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    num_cpus, memory_bytes = float(len(os.sched_getaffinity(0))), psutil.virtual_memory().total
    assert local_facts() == ClusterFacts(num_cpus=num_cpus, num_gpus=2.0, memory_bytes=memory_bytes)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert local_facts().num_gpus == 1.0


def test_a_machine_without_the_driver_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_facts, "NVIDIA_GPUS", tmp_path / "nothing")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_facts().num_gpus == 0.0


@pytest.mark.parametrize(("named", "expected"), [(None, None), ("", None), ("local", None), ("10.0.0.1:6379", "10.0.0.1:6379")])
def test_a_cluster_is_the_one_that_the_environment_names(
    named: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named is not None:
        monkeypatch.setenv("RAY_ADDRESS", named)
    assert address() == expected


def test_variables_that_let_data_or_names_run_code_are_each_named_with_the_way_out() -> None:
    assert unsafe_variables({"PATH": "/bin", "RAY_ADDRESS": "local"}) == []
    problems = unsafe_variables(dict.fromkeys(UNSAFE_VARIABLES, "0"))
    assert [problem.where for problem in problems] == [f"environment variable {name}" for name in UNSAFE_VARIABLES]
    assert problems[0].fix == f"Run `unset {UNSAFE_VARIABLES[0]}`."
