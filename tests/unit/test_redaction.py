"""What a run ran with is recorded, and what looks like a secret is not."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from raymill.record.environment import environment
from raymill.redaction import redact

# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "values",
    [
        {"password": "hunter2"},
        {"db_password": 12345},
        {"apiKey": "hunter2"},
        {"HF_TOKEN": "hunter2"},
        {"aws_secret_access_key": "hunter2"},
        {"credentials": {"user": "a", "pin": "hunter2"}},
        {"data": {"uri": "postgresql://me:hunter2@db/x"}},
        {"places": ["s3://bucket", "https://me:hunter2@host/path"]},
    ],
)
def test_secrets_are_hidden_wherever_they_stand(values: dict[str, Any]) -> None:
    shown = json.dumps(redact(values))
    assert "***" in shown
    assert "hunter2" not in shown
    assert "12345" not in shown


def test_what_only_sounds_secret_is_kept() -> None:
    values = {
        "max_tokens": 128,
        "tokenizer": "words",
        "key_width": 64,
        "pad_token": 0,
        "monkey": "yes",
        "password": None,
        "uri": "https://host:8080/path@2",
        "lr": 0.1,
    }
    assert redact(values) == values


def test_redact_leaves_its_argument_alone() -> None:
    values = {"deep": {"token": "hunter2"}}
    redact(values)
    assert values == {"deep": {"token": "hunter2"}}


# ---------------------------------------------------------------- what a run ran with


def test_the_environment_holds_versions_and_no_secret_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["raymill", "train", "--set", "data.password=hunter2", "--token", "hunter2", "--workers", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("CANARY", "hunter3")
    record = environment()
    assert record["command"][4:] == ["--token", "***", "--workers", "2"]
    assert record["versions"]["torch"]
    text = json.dumps(record)
    assert "hunter" not in text


def test_the_environment_is_taken_without_git_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    record = environment()
    assert (record["git_commit"], record["git_dirty"]) == (None, None)
