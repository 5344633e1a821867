"""What there is to run on: the GPUs that CUDA would show, and where the cluster is."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raymill.config.plan import ClusterFacts
from raymill.errors import InputError
from raymill.orchestration import cluster_facts
from raymill.orchestration.cluster_facts import (
    SILENT_TIMEOUT_S,
    UNSAFE_VARIABLES,
    address,
    ask_cluster,
    local_facts,
    unsafe_variables,
    visible_gpus,
    why_no_ray,
)


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


# ---------------------------------------------------------------- an address where there is no Ray


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Accepts connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def place(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def answering(listener: socket.socket, words: bytes) -> threading.Thread:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1024)
            connection.sendall(words)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as made:
        return place(made)


def test_a_refused_connection_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    named = closed_port()
    monkeypatch.setenv("RAY_ADDRESS", named)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    began_s = time.monotonic()
    with pytest.raises(InputError) as caught:
        ask_cluster()
    assert time.monotonic() - began_s < 2
    (problem,) = caught.value.problems
    assert problem.where == "environment variable RAY_ADDRESS"
    assert problem.found == f"{named!r}: the connection is refused: nothing listens there"
    assert "unset RAY_ADDRESS" in problem.fix


def test_a_missing_token_and_a_wrong_address_are_said_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed_port())
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError) as caught:
        ask_cluster()
    assert [problem.where.rpartition(" ")[2] for problem in caught.value.problems] == ["RAY_AUTH_TOKEN", "RAY_ADDRESS"]


def test_a_host_that_accepts_and_never_answers_is_waited_for_no_longer_than_told(listener: socket.socket) -> None:
    began_s = time.monotonic()
    assert why_no_ray(place(listener), 0.5) == "no answer within 0.5 s"
    assert time.monotonic() - began_s < 5
    assert SILENT_TIMEOUT_S == 10


def test_a_server_of_another_kind_is_no_ray(listener: socket.socket) -> None:
    thread = answering(listener, b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert "does not speak as Ray does" in str(why_no_ray(place(listener), 30))
    thread.join()


def test_a_server_that_hangs_up_is_no_ray(listener: socket.socket) -> None:
    thread = answering(listener, b"")
    assert "does not speak as Ray does" in str(why_no_ray(place(listener), 30))
    thread.join()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_what_answers_with_the_settings_of_http2_may_be_ray(scheme: str, listener: socket.socket) -> None:
    thread = answering(listener, bytes.fromhex("000018040000000000000400400000"))
    assert why_no_ray(scheme + place(listener), 30) is None
    thread.join()


def test_of_an_encrypted_port_only_the_connection_is_tried(listener: socket.socket) -> None:
    assert why_no_ray(place(listener), 30, encrypted=True) is None
    assert "refused" in str(why_no_ray(closed_port(), 30, encrypted=True))


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("nowhere.invalid:6379", "an unknown host"),
        ("127.0.0.1", "no host:port"),
        ("127.0.0.1:ray", "no host:port"),
        (":6379", "no host:port"),
        ("127.0.0.1:99999", "no host:port"),
    ],
)
def test_an_address_that_is_none_is_told_why(named: str, why: str) -> None:
    assert why in str(why_no_ray(named, 5))


def test_where_ray_is_to_look_itself_it_is_left_to() -> None:
    assert why_no_ray("auto") is None
