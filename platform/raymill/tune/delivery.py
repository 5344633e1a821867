"""The process that delivers a search to MLflow: a parent run, each trial's runs beneath it, pictures, the best model.

    python -m raymill.tune.delivery STUDY_FOLDER

Trials are delivered once they are over, by what their own folders hold; nothing is lost or doubled when this process is killed:
it goes on behind the last trial that is noted, and what it sends twice has the same effect.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill import ending_gc  # noqa: F401  # the process ends faster
from raymill.config.search import SearchSpec
from raymill.config.spec import JobSpec, RegisterSpec
from raymill.errors import RaymillError
from raymill.files import read_record, waiting_lock, write_record
from raymill.models.registration import register
from raymill.record.folder import RunFolder, run_folder
from raymill.redaction import print_redacted, redact, redact_text
from raymill.tracking import description
from raymill.tracking.brief import deliver_briefly, log_history
from raymill.tracking.description import DESCRIPTION_TAG, RUN_ID_TAG
from raymill.tracking.mlflow_client import connect, experiment_id, mlflow_settings, plain_key, store_failures
from raymill.tracking.mlflow_sync import deliver_all
from raymill.tune import pictures
from raymill.tune.folder import NOTHING_DELIVERED, StudyFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("raymill.tune")

POLL_S = 1.0
GIVE_UP_S = 120.0


class StudyDelivery:
    """Delivers one study. A call that raises can be repeated."""

    def __init__(self, folder: StudyFolder) -> None:
        """Of this study; goes on where an earlier process stopped."""
        self.folder = folder
        self.record = read_record(folder.record)
        self._goes_on = folder.delivered.exists()
        self.done = read_record(folder.delivered) if self._goes_on else dict(NOTHING_DELIVERED)
        self._client: MlflowClient | None = None
        self._experiment = ""

    def deliver(self) -> bool:
        """Deliver what is new; returns whether the study is over and all of it is delivered."""
        client = self._client = self._client or connect()
        self._experiment = self._experiment or experiment_id(client, self.record["spec"]["name"])
        if self.done["parent"] is None:
            self._note(parent=self._open(client))
        over = self.folder.summary.exists()
        with self.folder.trials.open("rb") if self.folder.trials.exists() else open(os.devnull, "rb") as file:
            file.seek(self.done["offset"])
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if trials := [json.loads(line) for line in whole.splitlines()]:
            self._trials(client, trials)
            self._note(offset=self.done["offset"] + len(whole))
        if over and not self.done["closed"]:
            self._close(client, read_record(self.folder.summary))
        return over

    def _note(self, **what: Any) -> None:
        self.done |= what
        write_record(self.folder.delivered, self.done)

    def _open(self, client: MlflowClient) -> str:
        """The parent run, made where it is not there."""
        name, experiment = self.record["spec"]["name"], self._experiment
        there = client.search_runs([experiment], f"tags.`{RUN_ID_TAG}` = '{self.folder.name}'", max_results=1)
        if there:
            return str(there[0].info.run_id)
        tags = redact(description.opening_tags(self.folder.name, name, self.record["environment"]))
        begun_ms = int(self.record["begun_s"] * 1000)
        called = f"search {description.run_name(self.folder.name, name)}"
        made = client.create_run(experiment, begun_ms, {**tags, "raymill.kind": "search"}, run_name=called)
        search = SearchSpec.model_validate(self.record["search"])
        space = {
            plain_key(f"space/{field}"): json.dumps(one.model_dump(exclude_defaults=True)) for field, one in search.space.items()
        }
        facts = {"metric": self.record["metric"], "mode": self.record["mode"], "sampler": search.sampler.kind}
        for key, value in {**space, **facts, "scheduler": search.scheduler.kind}.items():
            client.log_param(made.info.run_id, key, str(value)[:500])
        return str(made.info.run_id)

    def _trials(self, client: MlflowClient, trials: Sequence[dict[str, Any]]) -> None:
        """Some trials: their own runs, and their places in the parent's history."""
        parent = self.done["parent"]
        for trial in trials:
            for run_id in trial["runs"]:
                folder = run_folder(run_id)
                if folder.events.exists():
                    tags = {"raymill.trial": str(trial["number"]), "raymill.trial.state": trial["state"]}
                    name = f"trial {run_id.removeprefix(f'{self.folder.name}-')}"
                    place = client, folder, self._experiment, parent, name
                    deliver_briefly(*place, trial["values"], tags, may_be_there=self._goes_on)
        self._goes_on = False
        told = [(one["number"], one["value"], one["time_s"]) for one in trials if one["value"] is not None]
        log_history(client, parent, "trial", told)

    def _close(self, client: MlflowClient, summary: dict[str, Any]) -> None:
        """The end of the parent run: what came of it, pictures, the best trial's model."""
        parent, best = self.done["parent"], summary["best"]
        if best:
            client.log_metric(parent, "best", best["value"])
            client.log_dict(parent, {"values": best["values"], "trial": best["number"], "runs": best["runs"]}, "best.json")
            client.set_tag(parent, "raymill.best_trial", str(best["number"]))
        found, drawn = pictures.draw(self.folder)
        for name, share in found.items():
            client.log_metric(parent, plain_key(f"importance/{name}"), share)
        for path in drawn:
            client.log_artifact(parent, str(path))
        job = self.record["spec"]["name"]
        text = description.describe_search(self.folder.name, job, summary, parent, [path.name for path in drawn])
        client.set_tag(parent, DESCRIPTION_TAG, description.signed(redact_text(text)))
        spec = JobSpec.model_validate(self.record["spec"])
        if best:
            # The best one whole: every step, its records and pictures.
            folder = run_folder(best["runs"][0])
            if not deliver_all(folder, _no_model):
                raise DeliveryFailed(read_record(folder.tracking_failure)["message"])
        if best and spec.register_ is not None:
            self._register(client, run_folder(best["runs"][0]), spec.register_, summary)
        client.set_terminated(parent, "FINISHED")
        self._note(closed=True)

    def _register(self, client: MlflowClient, folder: RunFolder, under: RegisterSpec, summary: dict[str, Any]) -> None:
        """Register the best trial's model, with what it beat."""
        try:
            made = register(folder, under=under)
        except RaymillError as error:
            self._note(note=f"the best model was not registered: {error}")
            return
        write_record(folder.model_version, made)
        beat = {"raymill.study": self.folder.name, "raymill.study.trials": sum(summary["trials"].values())}
        if summary["job_as_it_stands"] is not None:
            beat["raymill.study.job_as_it_stands"] = summary["job_as_it_stands"]
        for key, value in beat.items():
            client.set_model_version_tag(made["name"], str(made["version"]), key, str(value))
        self._note(model=made)


class DeliveryFailed(OSError):
    """MLflow did not take a trial; the same again may go through."""


def _no_model(folder: RunFolder) -> dict[str, Any]:
    raise AssertionError(f"run {folder.run_id} is a trial, and registers nothing")


def main(arguments: list[str]) -> int:
    """Deliver until the study is over. Returns 0: all is delivered, 1: it is not."""
    logging.basicConfig(level=logging.WARNING)
    folder = StudyFolder(Path(arguments[0]))
    command = os.getppid()
    failed_since_s: float | None = None
    with waiting_lock(folder.delivery_lock), mlflow_settings():
        delivery = StudyDelivery(folder)
        deliver = partial(delivery.deliver)
        while os.getppid() == command:
            try:
                # MLflow is not opened before there is something to tell.
                if (folder.trials.exists() or folder.summary.exists()) and deliver():
                    return 0
                failed_since_s = None
            except store_failures() as error:
                failed_since_s = failed_since_s or time.monotonic()
                log.warning("%s", error)
                if folder.summary.exists() and time.monotonic() - failed_since_s > GIVE_UP_S:
                    return 1
            time.sleep(POLL_S)
    return 1


if __name__ == "__main__":
    sys.excepthook = print_redacted
    sys.exit(main(sys.argv[1:]))
