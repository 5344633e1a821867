"""Secrets: what looks like one is found by one rule, refused in a job, and hidden at every way out, and nothing else is."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raymill import errors
from raymill.checkpoint.directory import WEIGHTS
from raymill.cli.app import app
from raymill.config.load import load_job
from raymill.data.bad_rows import BadRow
from raymill.errors import InputError, RunError, TrackingError
from raymill.files import read_record, write_record
from raymill.models import registry
from raymill.orchestration.on_ray import driver
from raymill.orchestration.on_ray.session_folder import VARIABLE
from raymill.orchestration.on_ray.turn import Turn
from raymill.record.bad_row_ledger import BadRowLedger
from raymill.record.environment import environment
from raymill.record.events import AttemptStarted, RunStopped, append_event
from raymill.record.folder import RunFolder, run_folder
from raymill.redaction import find_secrets, for_people, redact, redact_arguments, redact_text
from raymill.tracking import mlflow_sync
from raymill.trained.files import lay_out
from raymill.trained.model import Trained

SECRET = "canary-4711"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"cannot open postgresql://me:{SECRET}@db:5432/x now", "cannot open postgresql://me:***@db:5432/x now"),
        (f"postgres://me:{SECRET}/with@host/db", "postgres://me:***@host/db"),
        (f"git+https://{SECRET}@host/me/x.git", "git+https://***@host/me/x.git"),
        (f"https://h/x?token={SECRET}&page=2", "https://h/x?token=***&page=2"),
        (f"https://h/x?page=2&sig={SECRET}", "https://h/x?page=2&sig=***"),
        (f"https://h/x?X-Amz-Signature={SECRET}&y=1", "https://h/x?X-Amz-Signature=***&y=1"),
        (f"Server=db;Pwd={SECRET};Uid=me", "Server=db;Pwd=***;Uid=me"),
        (f"Server=db;Password={SECRET}, too;Uid=me", "Server=db;Password=***, too;Uid=me"),
        (f"401: Bearer {SECRET} is not known", "401: Bearer *** is not known"),
        (f"Authorization: Basic {SECRET}", "Authorization: Basic ***"),
        (f"{{'api_key': '{SECRET}', 'rows': 3}}", "{'api_key': '***', 'rows': 3}"),
        (f'{{"password": "{SECRET}"}}', '{"password": "***"}'),
        (f"--set data.password={SECRET} --workers 2", "--set data.password=*** --workers 2"),
        (f"--set=data.password={SECRET}", "--set=data.password=***"),
        *((f"{key}={SECRET}", f"{key}=***") for key in ("pwd", "auth", "pat", "dsn", "tokens", "dbpassword", "accesstoken")),
    ],
)
def test_only_the_part_of_a_text_that_is_secret_is_hidden(text: str, shown: str) -> None:
    assert redact_text(text) == shown
    assert redact_text(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "unexpected token: }",
        "missing key: label",
        "KeyError: 'password'",
        "pad_token=0 num_keys=3 max_tokens=128",
        "https://host:8080/path@2",
        "abfss://container@account.example/x",
        "job.yaml:7 data.password: found a literal secret",
        "password=None",
        "a step of 3 rows, seed=1",
    ],
)
def test_what_only_sounds_secret_stays_as_it_is(text: str) -> None:
    assert redact_text(text) == text


def test_values_of_variables_that_look_secret_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "plain-words-1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:only%21here@db/x")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redact_text("got plain-words-1, only!here and abc") == "got ***, *** and abc"
    assert str(Path.cwd()) in redact_text(f"in {Path.cwd()}")


@pytest.mark.parametrize("piece", ["a", "://a:b", "://", "password='", "http://", "password=", "-", "bearer ", "x:'"])
def test_a_long_text_takes_no_long_time(piece: str) -> None:
    began_s = time.monotonic()
    redact_text(piece * (200_000 // len(piece)))
    assert time.monotonic() - began_s < 10


# ---------------------------------------------------------------- one rule for refusing and for hiding

SETTINGS: dict[str, Any] = {
    "keys": ["image", "label"],
    "num_keys": 3,
    "key_columns": ["a"],
    "token_column": "text",
    "tokens": 5,
    "pad_token": 0,
    "use_token": True,
    "label_key": "label",
    "key": "image",
    "sortKey": "row_id",
    "group_keys": "patient",
    "password_file": "/run/secrets/x",
    "root": "s3://bucket/x@2",
}


def test_settings_are_neither_hidden_nor_refused() -> None:
    assert redact(SETTINGS) == SETTINGS
    assert list(find_secrets(SETTINGS)) == []


@pytest.mark.parametrize("key", ["password", "pwd", "auth", "pat", "dsn", "tokens", "dbpassword", "accesstoken", "apiKey"])
def test_what_is_hidden_is_refused_too(key: str) -> None:
    values = {"data": {"deep": [{key: SECRET}]}}
    assert SECRET not in json.dumps(redact(values))
    assert list(find_secrets(values)) == [f"data.deep.0.{key}"]


@pytest.mark.parametrize(
    "values",
    [
        {"api_key": "sesame"},
        {"aws_access_key": "sesame"},
        {"private_keys": "sesame"},
        {"sshKey": "sesame"},
        {"ENCRYPTION_KEY": "sesame"},
        {"key": "s3same"},
        {"label_key": "Sesame"},
        {"key": "open-sesame"},
        {"key": "opensesameopensesameopense"},
        {"wandb_key": "0123456789abcdef"},
        {"token": "label"},
        {"auth": "label"},
        {"pat": "label"},
    ],
    ids=str,
)
def test_a_word_is_a_secret_where_the_key_opens_something_and_no_plain_word_is_none(values: dict[str, str]) -> None:
    ((key, value),) = values.items()
    assert list(find_secrets(values)) == [key]
    assert value not in json.dumps(redact(values)).replace(key, "")


def test_a_job_may_name_keys_and_is_refused_with_a_secret_that_no_message_repeats() -> None:
    with pytest.raises(InputError) as caught:
        load_job("smoke", ["data.keys=[image, label]", "data.label_key=label", f"data.dbpassword={SECRET}"])
    found = {problem.where: problem for problem in caught.value.problems}
    assert found["--set data.dbpassword"].found == "a literal secret"
    assert found["--set data.keys"].found != "a literal secret"
    assert found["--set data.label_key"].found != "a literal secret"
    assert SECRET not in str(caught.value)


def test_the_records_beside_a_model_are_those_of_the_run(tmp_path: Path) -> None:
    folder = run_folder("run-1")
    checkpoint = folder.checkpoints / "step-1.1"
    checkpoint.mkdir(parents=True)
    (checkpoint / WEIGHTS).write_bytes(b"weights")
    records = {
        folder.spec: {"data": {"keys": ["image"], "access_token": "t"}},
        folder.plan: {"pwd": "x"},
        folder.data_manifest: {},
    }
    for path, values in records.items():
        write_record(path, values)
    beside = tmp_path / "beside"
    lay_out(Trained("-", "run-1", checkpoint / WEIGHTS, "-", None, None, folder.path), beside)  # type: ignore[arg-type]
    assert {path: read_record(beside / path.name) for path in records} == records


# ---------------------------------------------------------------- ways out


def test_messages_of_events_are_written_without_secrets() -> None:
    folder = run_folder("run-1")
    note = f"https://me:{SECRET}@host was passed over"
    append_event(folder, AttemptStarted(attempt=1, num_workers=1, step=0, num_total_steps=1, resumed=False, notes=(note,)))
    append_event(folder, RunStopped(reason="failed", message=f"Bearer {SECRET} refused"))
    text = folder.events.read_text()
    assert SECRET not in text
    assert "was passed over" in text
    assert "Bearer *** refused" in text


def test_reasons_of_bad_rows_are_listed_without_secrets() -> None:
    folder = run_folder("run-1")
    folder.path.mkdir(parents=True)
    listed: list[Any] = []
    ledger = BadRowLedger(folder, "quarantine", 5, listed.append)
    ledger.add([BadRow("train", 1, "a.parquet", 0, 1, f"no https://h/?token={SECRET}")])
    assert SECRET not in folder.quarantine.read_text() + repr(listed)


@pytest.mark.parametrize("error", [RunError(f"s3://me:{SECRET}@h is gone"), ValueError(f"password={SECRET} is wrong")])
def test_a_failed_driver_says_why_without_secrets(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def drive(turn: Turn, group: None) -> int:
        raise error

    monkeypatch.setattr(driver, "_drive", drive)
    monkeypatch.setattr(driver, "_stop_on_sigterm", lambda turn: None)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    if isinstance(error, RunError):
        assert driver.main([str(tmp_path)]) == driver.FAILED
    else:
        with pytest.raises(ValueError, match="password"):
            driver.main([str(tmp_path)])
    said = str(errors.from_record(read_record(folder.failure)))
    assert "***" in said
    assert SECRET not in said


def test_why_tracking_failed_is_noted_and_logged_without_secrets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    with caplog.at_level(logging.ERROR):
        mlflow_sync._note_failure(folder, RuntimeError(f"no answer of postgresql://me:{SECRET}@db/x"))
    assert read_record(folder.tracking_failure)["message"] == "no answer of postgresql://me:***@db/x"
    assert SECRET not in caplog.text


def test_a_line_of_the_trackers_log_holds_no_secret() -> None:
    try:
        raise ValueError(f"Bearer {SECRET}")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "at %s", (f"http://me:{SECRET}@h",), sys.exc_info())
    line = mlflow_sync.RedactingFormatter("%(message)s").format(record)
    assert "http://me:***@h" in line
    assert "ValueError" in line
    assert SECRET not in line


@contextmanager
def unreachable() -> Iterator[None]:
    raise OSError(f"cannot open postgresql://me:{SECRET}@db/x")
    yield


def test_an_unreachable_registry_is_told_of_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://db/x")
    monkeypatch.setattr(registry, "mlflow_settings", unreachable)
    with pytest.raises(TrackingError) as caught:
        registry.list_models()
    assert "postgresql://me:***@db/x" in str(caught.value)
    result = CliRunner().invoke(app, ["models", "list", "--json"])
    assert result.exit_code == 1
    assert "postgresql://me:***@db/x" in json.loads(result.stdout)["message"]
    assert SECRET not in result.output + result.stderr


def test_an_error_of_the_jobs_code_is_printed_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError(f"--token={SECRET} is wrong")

    monkeypatch.setattr(registry, "list_models", fail)
    result = CliRunner().invoke(app, ["models", "list"])
    assert result.exit_code == 1
    assert "test_secrets.py:" in result.stderr
    assert "ValueError: --token=*** is wrong" in result.stderr
    assert SECRET not in result.stderr


@pytest.mark.parametrize(
    "form", [[f"--set=data.password={SECRET} b=c"], ["--set", f"data.password={SECRET}"], ["--token", SECRET]]
)
def test_the_recorded_command_holds_no_secret(form: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["raymill", "train", *form, "--set", "data.keys=[image,label]"])
    command = environment()["command"]
    assert "***" in " ".join(command)
    assert SECRET not in " ".join(command)
    assert command[-1] == "data.keys=[image,label]"


def test_an_argument_is_hidden_to_its_end() -> None:
    assert redact_arguments(["--set=data.password=a b=c"]) == ["--set=data.password=***"]


def test_what_people_are_shown_does_not_steer_their_terminal() -> None:
    assert for_people("a\x1b[31mb\x07\r\nc\td\u202e") == "a[31mb\nc\td"
