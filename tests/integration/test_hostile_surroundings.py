"""What lies in the current folder, stands in the environment, or comes from another page does not get in."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import psutil
import pytest

PROJECT = Path(__file__).parents[2]
PLANTED = ("mlflow", "psutil", "filelock", "pydantic", "numpy", "flask", "uvicorn", "sqlite3")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with modules that have the names of libraries and leave a mark when they are imported."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name in PLANTED:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + chr(10))\n")
    return folder


class Page(NamedTuple):
    """MLflow's page, as `raymill ui` gives it."""

    port: int
    user: str
    password: str
    process: subprocess.Popen[str]


@pytest.fixture
def page(hostile: Path, state_folder: Path) -> Iterator[Page]:
    """The page, started from a hostile folder and with an environment that would open it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {**os.environ, "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true", "MLFLOW_SERVER_ALLOWED_HOSTS": "*"}
    command = [sys.executable, "-P", "-m", "raymill", "ui", "--port", str(port)]
    process = subprocess.Popen(command, cwd=hostile, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    try:
        user, password = wait_until_it_listens(process.stderr, port)
        yield Page(port, user, password, process)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        process.stderr.close()


def wait_until_it_listens(printed: IO[str], port: int) -> tuple[str, str]:
    found = next(filter(None, (re.search(r"http://(\w+):([^@]+)@127\.0\.0\.1", line) for line in printed)))
    # What the server prints goes on; somebody must read it.
    threading.Thread(target=printed.read, daemon=True).start()
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return found[1], found[2]
        time.sleep(0.1)
    raise TimeoutError("the page did not come up")


def ask(page: Page, path: str, *, method: str = "GET", anonymous: bool = False, **headers: str) -> int:
    request = urllib.request.Request(
        f"http://127.0.0.1:{page.port}{path}", method=method, data=b"{}" if method != "GET" else None
    )
    if not anonymous:
        secret = base64.b64encode(f"{page.user}:{page.password}".encode()).decode()
        request.add_header("Authorization", f"Basic {secret}")
    for name, value in {"Content-Type": "application/json", **headers}.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_mlflows_page_lets_nobody_in_without_its_password_and_runs_nothing_from_the_folder(page: Page, tmp_path: Path) -> None:
    create = "/api/2.0/mlflow/experiments/create"
    assert ask(page, "/") == 200
    assert ask(page, "/", anonymous=True) == 401
    assert ask(page, create, method="POST", anonymous=True) == 401
    assert ask(page, "/api/2.0/mlflow-artifacts/artifacts/a/b", method="PUT", anonymous=True) == 401
    assert ask(page, "/graphql", method="POST", anonymous=True) == 401
    assert ask(page, "/", Host="attacker.example") == 403
    assert ask(page, create, method="POST", Origin="http://attacker.example") == 403
    listening = {
        connection.laddr.ip
        for process in [psutil.Process(page.process.pid), *psutil.Process(page.process.pid).children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    assert not (tmp_path / "ran").exists()


def test_a_run_imports_nothing_from_the_current_folder_but_the_project(hostile: Path, tmp_path: Path) -> None:
    # Not a project: the folder that the command is given in. Its own job code is imported from the project's root alone.
    command = [sys.executable, "-P", "-m", "raymill", "train", str(PROJECT / "jobs" / "smoke"), "--in-process", "--json"]
    subprocess.run(command, cwd=hostile, capture_output=True, text=True, timeout=120, check=False)
    assert not (tmp_path / "ran").exists()


def test_the_processes_of_a_run_import_nothing_from_the_folder_that_the_command_is_given_in(
    hostile: Path, tmp_path: Path, state_folder: Path
) -> None:
    for folder in ("jobs", "pipelines"):
        shutil.copytree(PROJECT / folder, hostile / folder)
    (hostile / "pyproject.toml").touch()
    # Ray itself puts the project's root before the libraries in its workers, where what they need would be taken from there.
    for name in ("numpy", "psutil", "pydantic", "sqlite3"):
        (hostile / f"{name}.py").unlink()
    command = [sys.executable, "-P", "-m", "raymill", "train", "smoke", "--set", "loop.epochs=1", "--workers", "1", "--json"]
    done = subprocess.run(command, cwd=hostile, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    ran = set((tmp_path / "ran").read_text().split()) if (tmp_path / "ran").exists() else set()
    log = next(state_folder.glob("runs/*/tracking.log")).read_text()
    assert "mlflow" not in ran, log
    assert "filelock" not in ran
