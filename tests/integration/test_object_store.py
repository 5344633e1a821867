"""A job whose rows lie in an object store that fails now and then: with a killed worker, the weights of the same rows on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration.commands import Home
from object_store import serving
from pipelines.images import get_mnist

pytestmark = pytest.mark.integration

STRICT = ("--set", "loop.strict=true", "--set", "checkpoint.every_steps=5")
JOB = ("jobs/mnist/job.yaml", "--json", "--set", "loop.epochs=1", *STRICT)


def test_a_worker_that_is_killed_costs_nothing(tmp_path: Path) -> None:
    here, there = Home(tmp_path / "here"), Home(tmp_path / "there")
    get_mnist(tmp_path / "mnist")
    expected = here.json("train", *JOB, "--in-process", "--set", f"data.root={tmp_path / 'mnist'}")
    with serving() as store:
        address = store.upload(tmp_path / "mnist", "mnist")
        store.fault = lambda number, method, path: ("500", "503", "cut")[number % 3] if number % 10 == 0 else None
        variables = {
            **store.environment,
            "RAYMILL_FAULT": "after_forward:kill:rank=1:step=17",
            "RAYMILL_FAULT_FOLDER": str(tmp_path),
        }
        command = ("train", *JOB, "--workers", "2", "--set", f"data.root={address}")
        code, stdout, stderr = there.run(*command, variables=variables)
        assert code == 0, stderr
        assert store.faults > 5
    summary = json.loads(stdout)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert summary["attempts"] == 2
    assert not here.left_over() + there.left_over()
