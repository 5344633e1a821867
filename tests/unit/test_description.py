"""What people read of a run in MLflow: names that differ early, short facts, and prose that a person can type from."""

from __future__ import annotations

from typing import Any

import pytest

from raymill.tracking.description import (
    MAX_DESCRIPTION_LETTERS,
    PARENT_TAG,
    RunFacts,
    describe_run,
    describe_version,
    is_ours,
    opening_tags,
    plan_page,
    run_name,
    signed,
)

MACHINE = {
    "python": "3.11.7",
    "versions": {"torch": "2.14.1", "ray": "2.60.0", "numpy": "2.4.6"},
    "user": "anna",
    "git_commit": "c" * 40,
    "git_branch": "main",
    "git_dirty": True,
    "command": ["/home/anna/.venv/bin/raymill", "train", "mnist", "--set", "loop.epochs=2", "--set", "data.name=a b"],
}
KNOWN = {
    "run_id": "mnist-20261125-015515-09780c",
    "status": "finished",
    "message": None,
    "started_s": 1795571744.6,
    "attempts": 2,
    "step": 114,
    "num_total_steps": 114,
    "metrics": {"validation/accuracy": 0.96},
    "mlflow_run_id": "m1",
}


def test_names_of_runs_of_a_job_differ_in_their_first_letters() -> None:
    job = "a-job-with-a-long-name"
    names = [run_name(f"{job}-{stamp}", job) for stamp in ("20261125-015515-09780c", "20261125-015601-09780c")]
    assert names == ["11-25 01:55 097 a-job-with-a-long-name", "11-25 01:56 097 a-job-with-a-long-name"]
    assert run_name("run-1", job) == "run-1"


def test_the_tags_of_a_new_run_are_short_facts() -> None:
    tags = opening_tags("run-1", "mnist", MACHINE)
    assert tags == {
        "raymill.run_id": "run-1",
        "mlflow.user": "anna",
        "mlflow.source.name": "raymill train mnist",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": "c" * 40,
        "mlflow.source.git.branch": "main",
        "mlflow.source.git.dirty": "true",
        "raymill.command": "raymill train mnist --set loop.epochs=2 --set 'data.name=a b'",
        "raymill.python": "3.11.7",
        "raymill.versions.torch": "2.14.1",
        "raymill.versions.ray": "2.60.0",
    }
    assert opening_tags("run-1", "mnist", {}, "m0")[PARENT_TAG] == "m0"


@pytest.mark.parametrize(
    ("program", "source"),
    [("/x/raymill", "raymill train mnist"), ("/x/raymill/__main__.py", "raymill train mnist"), ("/x/sweep.py", "sweep.py")],
)
def test_the_source_of_a_run_is_the_command_or_the_program_that_called(program: str, source: str) -> None:
    assert opening_tags("run-1", "mnist", {"command": [program, "train"]})["mlflow.source.name"] == source


def test_a_signed_text_is_ours_until_a_letter_of_it_is_changed() -> None:
    text = signed("**Running**")
    assert text.startswith("**Running**\n")
    assert all(map(is_ours, (None, "", " \n", text, f"{text}\n")))
    assert not any(map(is_ours, ("My notes", text.replace("Running", "running"), f"{text} and more", f"My notes\n\n{text}")))
    long = signed("x" * 10_000)
    assert len(long) < MAX_DESCRIPTION_LETTERS + 100
    assert is_ours(long)


def described(**facts: Any) -> str:
    return describe_run(RunFacts(known=KNOWN | facts.pop("known", {}), folder="/runs/r", machine=MACHINE, **facts))


def test_a_finished_run_says_its_result_its_model_and_what_to_type() -> None:
    rows = {"used": 13_500, "skipped": 3, "remaining": 0, "total": 13_503}
    summary = {"best_step": 76, "metrics": {"validation/accuracy": 0.968}, "rows": rows, "num_workers": 2}
    summary |= {"rows_per_s": 1377.8, "weights_sha256": "ab" * 32}
    model = {"name": "mnist", "version": 3, "alias": "candidate"}
    text = described(summary=summary, model=model, pictures=["pictures/curves.png"])
    first, command, picture, facts = text.split("\n\n")
    assert first == (
        "**Finished** at step 114 of 114: validation/accuracy **0.968**, from the best checkpoint (step 76). "
        "Registered as [mnist version 3](#/models/mnist/versions/3)."
    )
    assert command == "```\nraymill evaluate mnist@candidate\n```"
    assert picture == "![pictures/curves.png](get-artifact?path=pictures/curves.png&run_uuid=m1)"
    assert facts.splitlines() == [
        "- run: `mnist-20261125-015515-09780c`",
        "- command: `raymill train mnist --set loop.epochs=2 --set 'data.name=a b'`",
        "- code: commit `cccccccccc` on main, with changes that are not committed",
        "- started: 2026-11-25 01:55 UTC",
        "- attempts: 2",
        "- rows trained on: 13,500 of 13,503, 3 left out",
        "- speed: 1,378 rows/s on 2 workers",
        f"- weights: SHA-256 `{'ab' * 32}`",
        "- files: `/runs/r`",
    ]


@pytest.mark.parametrize(
    ("status", "first", "command"),
    [
        ("failed", "**Failed** at step 50 of 114.", "raymill train --resume mnist-20261125-015515-09780c"),
        ("interrupted", "**Interrupted** at step 50 of 114.", "raymill train --resume mnist-20261125-015515-09780c"),
        ("running", "**Running**: attempt 2, 114 steps.", "raymill runs show mnist-20261125-015515-09780c"),
    ],
)
def test_a_run_that_is_not_finished_says_how_to_go_on(status: str, first: str, command: str) -> None:
    text = described(known={"status": status, "step": 50, "message": "rank 1: ```KeyError```"})
    assert text.startswith(first)
    assert f"```\n{command}\n" in text
    assert ("```\nrank 1: '''KeyError'''\n```" in text) == (status == "failed")


def test_a_version_says_where_it_comes_from_and_how_to_use_it() -> None:
    text = describe_version("mnist", "candidate", "run-1", 9, {"validation/loss": 0.123456789}, 4500)
    assert "step 9, of run `run-1`, trained on 4,500 rows" in text
    assert "- validation/loss: **0.123457**" in text
    assert "raymill evaluate mnist@candidate" in text


def test_the_plan_is_a_page_without_code_of_others() -> None:
    page = plan_page("<b>", {"train_rows": 4500, "format_version": 1, "reasons": {"train_rows": "<script>1</script>"}})
    assert "<td>train_rows</td><td>4,500</td><td>&lt;script&gt;1&lt;/script&gt;</td>" in page
    assert "Plan of &lt;b&gt;" in page
    assert "format_version" not in page
