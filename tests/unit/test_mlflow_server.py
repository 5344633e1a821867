"""MLflow's server with passwords: what is said before one is started, and what it is started with."""

from __future__ import annotations

import configparser
import importlib.util
import stat
from pathlib import Path

import pytest

from raymill.cluster.spec import ClusterFolder, ClusterSpec, NodeSpec, all_cluster_folders
from raymill.errors import InputError
from raymill.files import write_record
from raymill.tracking import server
from raymill.tracking.server import store_to_serve


def test_the_store_that_is_served_is_the_one_that_runs_write_to(state_folder: Path) -> None:
    assert store_to_serve() == f"sqlite:///{state_folder}/mlflow.db"
    assert not state_folder.exists()


def test_all_that_is_in_the_way_of_a_server_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as raised:
        store_to_serve()
    assert [problem.where for problem in raised.value.problems] == ["MLFLOW_TRACKING_URI", "MLflow's server"]
    assert 'pip install "raymill[server]"' in str(raised.value)


def test_nothing_of_a_cluster_is_started_if_its_server_cannot_be(monkeypatch: pytest.MonkeyPatch, state_folder: Path) -> None:
    from raymill.cluster import local

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="no Flask-WTF"):
        local.up("team", ClusterSpec(kind="local", nodes=[NodeSpec(num_cpus=1)], mlflow=True))
    assert not state_folder.exists()


def test_the_environment_of_a_user_does_not_open_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE", "MLFLOW_SERVER_ALLOWED_HOSTS"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    monkeypatch.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "known")
    given = server._environment(tmp_path, server.new_password())
    assert {name for name in given if name.startswith(("MLFLOW_SERVER_", "MLFLOW_AUTH_"))} == {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION",
        "MLFLOW_AUTH_CONFIG_PATH",
    }
    assert given["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == given["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert given["MLFLOW_FLASK_SERVER_SECRET_KEY"] != "known"


def test_the_password_goes_by_a_file_of_ones_own_and_users_that_are_there_stay(tmp_path: Path) -> None:
    password = server.new_password()
    (tmp_path / "users.db").write_bytes(b"users")
    (tmp_path / "users.db").chmod(0o600)
    given = server._environment(tmp_path, password)
    settings = configparser.ConfigParser()
    settings.read(given["MLFLOW_AUTH_CONFIG_PATH"])
    assert settings["mlflow"]["admin_password"] == password
    assert password not in "".join([*given.values(), *server._command("sqlite:///store.db", 5000)])
    assert (tmp_path / "users.db").read_bytes() == b"users"
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_every_cluster_of_which_something_is_kept_is_looked_at() -> None:
    assert all_cluster_folders() == []
    for name in ("two", "one"):
        ClusterFolder(name).make()
        write_record(ClusterFolder(name).record, {})
    assert [folder.name for folder in all_cluster_folders()] == ["one", "two"]
