"""A wrong file of cluster/ is refused with all that is wrong, each with what to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from raymill.cluster.spec import load_cluster
from raymill.cluster.submitted import _ask, _way
from raymill.errors import InputError


def test_all_mistakes_of_a_file_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.raymill]\n")
    written = "kind: local\nkeep_readdy: true\nobject_store_mb: 1\nnodes:\n  - {num_cpus: 2, num_gpus: 1}\n  - {num_cpu: 2}\n"
    (tmp_path / "cluster" / "mine.yaml").write_text(written)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        load_cluster("mine")
    found = {problem.where.rpartition(" ")[2]: problem for problem in refused.value.problems}
    assert set(found) == {"keep_readdy", "object_store_mb", "nodes.0.num_gpus", "nodes.1.num_cpus", "nodes.1.num_cpu"}
    assert "'keep_ready'" in found["keep_readdy"].fix
    assert "'num_cpus'" in found["nodes.1.num_cpu"].fix
    with pytest.raises(InputError, match="Did you mean 'mine'"):
        load_cluster("min")


class Jobs(BaseHTTPRequestHandler):
    """Answers as Ray's Jobs API does; `token` is what it asks for."""

    token: str | None = None

    def do_GET(self) -> None:
        """With the list of jobs, or a refusal."""
        given = self.headers.get("Authorization")
        right = self.token is None or given == f"Bearer {self.token}"
        self.send_response(200 if right else 403 if given else 401)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def dashboard() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Jobs) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_cluster_without_a_token_is_used_only_by_whoever_says_so(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Jobs, "token", None)
    for given in ("right", None):
        with pytest.raises(InputError, match=r"asks for no token(.|\n)*--insecure"):
            _ask("mine", dashboard, given, insecure=False)
        _ask("mine", dashboard, given, insecure=True)
    monkeypatch.setattr(Jobs, "token", "right")
    _ask("mine", dashboard, "right", insecure=False)
    for insecure in (True, False):
        with pytest.raises(InputError, match="HTTP 403"):
            _ask("mine", dashboard, "wrong", insecure=insecure)
        with pytest.raises(InputError, match="HTTP 401"):
            _ask("mine", dashboard, None, insecure=insecure)


def test_what_is_insecure_is_typed_and_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.raymill]\n")
    monkeypatch.chdir(tmp_path)
    for text in ("", "insecure: true\n", "insecure: false\n"):
        (tmp_path / "cluster" / "mine.yaml").write_text(f"kind: address\ndashboard: http://h:8265\n{text}")
        if text:
            with pytest.raises(InputError, match="type --insecure with each command"):
                load_cluster("mine")
    (tmp_path / "cluster" / "mine.yaml").write_text("kind: address\ndashboard: http://h:8265\n")
    assert _way("mine", load_cluster("mine", insecure=True)) == ("http://h:8265", None)
    with pytest.raises(InputError, match="token_file"):
        _way("mine", load_cluster("mine"))


@pytest.mark.parametrize(
    ("place", "is_right"), [("s3://b/runs", True), ("/mnt/runs", True), ("runs", False), ("http://h/runs", False)]
)
def test_runs_are_kept_where_files_are_taken(place: str, is_right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.raymill]\n")
    (tmp_path / "cluster" / "mine.yaml").write_text(f"kind: local\nruns_at: {place}\n")
    monkeypatch.chdir(tmp_path)
    if is_right:
        assert load_cluster("mine").runs_at == place
    else:
        with pytest.raises(InputError, match="the whole path of a folder"):
            load_cluster("mine")
