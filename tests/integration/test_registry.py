"""A trained model becomes a version in a real MLflow registry, is found again, and computes the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import raymill
from raymill.checkpoint import directory
from raymill.checkpoint.snapshot import Snapshot, content
from raymill.config import load
from raymill.config.plan import ClusterFacts, make_plan
from raymill.config.spec import JobSpec
from raymill.data.manifest import as_record, take_manifest
from raymill.errors import CheckpointError, InputError, RunError
from raymill.files import read_record, write_record
from raymill.models import exported, registration, registry
from raymill.models.find import find_model
from raymill.models.registry import ModelVersion
from raymill.orchestration.tracker import tracking_summary
from raymill.record.events import RunFinished, append_event
from raymill.record.folder import RunFolder, run_folder
from raymill.tracking.mlflow_client import connect, experiment_id, mlflow_settings, tracking_uri
from raymill.trained.model import SIGNATURE, VERSION_FILES

TRACKER = [sys.executable, "-m", "raymill.orchestration.tracker"]

# MLflow warns of a type hint of its own where it infers signatures.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")

CODE = """
import numpy as np
import torch
from torch import nn

from raymill.task import Field, Fragment, Pipeline, Task


class Points:
    def fragments(self):
        return [Fragment("points", part, 1 + part, 8, "x") for part in range(3)]

    def read(self, fragment):
        return {"x": np.full((fragment.num_rows, 3), fragment.part, np.float32)}


def points() -> Pipeline:
    return Pipeline(sources={"train": Points()}, schema={"x": Field("float32", (3,))})


class Line(Task):
    def __init__(self, width: int = 2, kind: str = "good"):
        self.width, self.kind = width, kind

    def build(self):
        class Net(nn.Module):
            def __init__(self, width, kind):
                super().__init__()
                self.kind = kind
                self.layers = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5))

            def forward(self, x, other=None):
                x = x if other is None else x + other
                if self.kind == "branching" and x.sum().item() > 0:
                    x = x * 2
                noise = torch.rand(()) if self.kind == "random" else 0
                return self.layers(x) + noise

        return Net(self.width, self.kind)

    def evaluate(self, model, batch):
        return {}

    def inputs(self, batch):
        return (batch["x"], batch["x"]) if self.kind == "two inputs" else (batch["x"],)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose own package holds the job's code; a name of its own, since `jobs` is this repository's."""
    root = tmp_path_factory.mktemp("project")
    (root / "tinyjobs").mkdir()
    (root / "tinyjobs" / "__init__.py").touch()
    (root / "tinyjobs" / "line.py").write_text(CODE)
    (root / "jobs").mkdir()
    (root / "pyproject.toml").write_text('[tool.raymill]\npackages = ["tinyjobs"]\n')
    return root


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)


def finished_run(run_id: str, seed: int = 0, kind: str = "good", export: str = "try") -> RunFolder:
    folder = run_folder(run_id)
    folder.checkpoints.mkdir(parents=True)
    spec = JobSpec.model_validate(
        {
            "name": "line",
            "task": "tinyjobs.line:Line",
            "pipeline": "tinyjobs.line:points",
            "model": {"width": 2, "kind": kind},
            "optimizer": {"kind": "SGD", "lr": 0.1},
            "register": {"model": "line", "export": export},
        }
    )
    taken = take_manifest(load.import_pipeline(spec))
    write_record(folder.spec, load.resolved(spec))
    facts = ClusterFacts(num_cpus=2, num_gpus=0, memory_bytes=2**33)
    write_record(folder.plan, make_plan(spec, taken, facts).as_record())
    write_record(folder.data_manifest, as_record(taken))
    torch.manual_seed(seed)
    weights = {
        "layers.0.weight": torch.randn(2, 3),
        "layers.0.bias": torch.randn(2),
        "layers.1.weight": torch.randn(2),
        "layers.1.bias": torch.randn(2),
        "layers.1.running_mean": torch.randn(2),
        "layers.1.running_var": torch.rand(2) + 0.5,
        "layers.1.num_batches_tracked": torch.tensor(7),
    }
    directory.save(folder.checkpoints, "step-00000009.1", content(Snapshot(weights, {}, {"step": 9}), best=True))
    append_event(folder, RunFinished(best_checkpoint="checkpoints/step-00000009.1", metrics={"validation/loss": 0.25}))
    with mlflow_settings():
        client = connect()
        run = client.create_run(experiment_id(client, "line"), tags={"raymill.run_id": run_id}, run_name=run_id)
    write_record(folder.delivery, {"mlflow_run_id": run.info.run_id})
    return folder


def register(folder: RunFolder) -> ModelVersion:
    """Register the model of a run; the version as the registry then has it."""
    with mlflow_settings():
        made = registration.register(folder)
    assert (made.keys() - {"not_exported"}, made["alias"]) == ({"name", "version", "alias"}, "candidate")
    return registry.resolve(f"{made['name']}/{made['version']}")


def mlflow_run(folder: RunFolder) -> Any:
    with mlflow_settings():
        return connect().get_run(read_record(folder.delivery)["mlflow_run_id"])


def logged_models(run: Any) -> list[Any]:
    with mlflow_settings():
        return list(connect().search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"))


def load_exported(made: ModelVersion) -> torch.nn.Module:
    """The exported graph, without pickle: known by its digest in the registry."""
    with mlflow_settings():
        tags = connect().get_model_version(made.name, str(made.version)).tags
    return exported.load_exported(registry.model_files(made).parent / exported.FILE, tags[registry.MODEL_TAG])


def load_with_mlflow(made: ModelVersion, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The exported graph, as whoever knows MLflow alone loads it."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri())
    loaded: torch.nn.Module = mlflow.pytorch.load_model(made.uri)
    return loaded


def weights_of(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.checkpoints / "step-00000009.1" / "weights.safetensors")


def test_a_registered_model_is_found_loads_without_pickle_and_computes_the_same_for_any_batch_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = finished_run("run-1")
    made = register(folder)
    assert (made.name, made.version, made.alias, made.run_id) == ("line", 1, "candidate", "run-1")
    assert made.metrics == {"validation/loss": 0.25}
    for reference in ("line@candidate", "line/1", "run-1"):
        assert registry.resolve(reference) == made

    weights = weights_of(folder)
    loaded, by_mlflow = load_exported(made), load_with_mlflow(made, monkeypatch)
    for num_rows in (1, 2, 17):
        x = torch.randn(num_rows, 3)
        inner = x @ weights["layers.0.weight"].T + weights["layers.0.bias"]
        expected = torch.nn.functional.batch_norm(
            inner, *(weights[f"layers.1.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        )
        torch.testing.assert_close(loaded(x), expected)
        torch.testing.assert_close(by_mlflow(x), expected)

    files = registry.model_files(made)
    assert {file.name for file in files.iterdir()} == {
        "weights.safetensors", "spec.json", "plan.json", "data_manifest.json", "signature.json", "checksums.json"
    }  # fmt: skip
    directory.verify(files, VERSION_FILES, may_have=[SIGNATURE])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(files / "weights.safetensors").items())
    assert JobSpec.model_validate(read_record(files / "spec.json")).model == {"width": 2, "kind": "good"}
    assert read_record(files / "plan.json") == read_record(folder.plan)
    assert read_record(files / "data_manifest.json") == read_record(folder.data_manifest)
    suffixes = {file.suffix for file in files.parent.rglob("*") if file.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pth", ".pt"}
    requirements = (files.parent / "requirements.txt").read_text()
    assert f"torch=={torch.__version__.partition('+')[0]}" in requirements

    shown = registry.show_model("line@candidate")
    state = json.loads((folder.checkpoints / "step-00000009.1" / "state.json").read_text())
    data_digest = read_record(folder.data_manifest)["digest"]
    assert re.fullmatch("[0-9a-f]{64}", data_digest)
    assert (shown["weights_sha256"], shown["data_digest"]) == (state["weights_sha256"], data_digest)
    assert shown["aliases"] == ["candidate"]
    run = mlflow_run(folder)
    assert run.info.status == "RUNNING"
    (logged,) = logged_models(run)
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    assert (logged.name, logged.status, logged.source_run_id) == ("line", "READY", run.info.run_id)
    with mlflow_settings():
        model, version = connect().get_registered_model("line"), connect().get_model_version("line", "1")
    assert model.description == "What the job **line** trained; a version for each run that finished."
    assert "step 9, of run `run-1`" in version.description
    assert version.source == f"models:/{logged.model_id}"
    assert not [value for value in version.tags.values() if value.startswith(("{", "["))]


def test_a_logged_model_has_the_runs_metrics_of_the_step_of_its_weights_and_none_is_doubled() -> None:
    folder = finished_run("run-1")
    run_id = mlflow_run(folder).info.run_id
    with mlflow_settings():
        for step, value in ((8, 0.5), (9, 0.25), (10, 0.375)):
            connect().log_metric(run_id, "validation/loss", value, step=step)
    register(folder)
    (logged,) = logged_models(mlflow_run(folder))
    assert [(metric.key, metric.step, metric.value) for metric in logged.metrics] == [("validation/loss", 9, 0.25)]
    with mlflow_settings():
        history = connect().get_metric_history(run_id, "validation/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(8, 0.5), (9, 0.25), (10, 0.375)]


def test_what_a_killed_registration_left_goes_and_metrics_of_an_earlier_raymill_are_read() -> None:
    folder = finished_run("run-1")
    run = mlflow_run(folder)
    with mlflow_settings():
        tags = {"raymill.run_id": "run-1"}
        connect().create_logged_model(run.info.experiment_id, "left", source_run_id=run.info.run_id, tags=tags)
    made = register(folder)
    assert [logged.name for logged in logged_models(run)] == ["line"]
    with mlflow_settings():
        connect().delete_model_version_tag("line", "1", "raymill.metric.validation/loss")
        connect().set_model_version_tag("line", "1", "raymill.metrics", '{"validation/loss": 0.25}')
    assert registry.resolve("line/1").metrics == made.metrics == {"validation/loss": 0.25}


def test_registering_the_same_weights_again_finds_the_version_and_the_alias_never_moves_back() -> None:
    first, second = finished_run("run-1", seed=1), finished_run("run-2", seed=2)
    assert [register(folder).version for folder in (first, first, second, first)] == [1, 1, 2, 1]
    assert registry.resolve("line@candidate").version == 2
    assert replace(registry.resolve("run-1"), alias=None) == replace(registry.resolve("line/1"), alias=None)
    (model,) = registry.list_models()
    assert (model["name"], model["versions"], model["aliases"]) == ("line", [2, 1], {"candidate": 2})


def test_a_model_of_several_inputs_is_registered_too() -> None:
    loaded, x = load_exported(register(finished_run("run-1", kind="two inputs"))), torch.randn(5, 3)
    assert loaded(x, 0 * x).shape == (5, 2)


NOT_EXPORTED = [
    ("branching", r"data-dependent.*line\.py:\d+ in forward: if self\.kind"),
    ("random", "computes something else"),
]


@pytest.mark.parametrize(("kind", "reason"), NOT_EXPORTED)
def test_where_an_export_is_required_a_model_without_is_refused_and_can_be_registered_by_hand(kind: str, reason: str) -> None:
    folder = finished_run("run-1", kind=kind, export="required")
    with pytest.raises(RunError, match=f"(?s)no export: .*{reason}.*raymill models register run-1 --export try"):
        register(folder)
    assert registry.list_models() == []
    assert logged_models(mlflow_run(folder)) == []
    made = registration.register_run("run-1", "try")
    assert (made["version"], read_record(folder.model_version)) == (1, made)
    assert re.search(reason, made["not_exported"])


@pytest.mark.parametrize(("kind", "reason"), NOT_EXPORTED)
def test_a_model_that_cannot_be_exported_is_registered_and_says_why(
    kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished_run("run-1", kind=kind)
    made = register(folder)
    shown = registry.show_model("line/1")
    assert re.search(reason, shown["not_exported"])
    assert (shown["takes"], shown["gives"], shown["exported"]) == (
        "x float32 of shape (3,)", "output float32 of shape (2,)", False
    )  # fmt: skip
    (logged,) = logged_models(mlflow_run(folder))
    assert logged.status == "READY"
    files = registry.model_files(made)
    assert not (files.parent / "data").exists()
    assert not {".pkl", ".pickle", ".pth", ".pt", ".pt2"} & {file.suffix for file in files.parent.rglob("*")}
    assert read_record(files / "signature.json")["gives"] == {"output": {"dtype": "float32", "shape": [2], "classes": None}}
    # MLflow alone says so, and loads nothing.
    with pytest.raises(Exception, match='does not have the "pytorch" flavor'):
        load_with_mlflow(made, monkeypatch)
    answer = raymill.model("line@candidate").predict({"x": np.zeros((3, 3), np.float32)})
    assert np.shape(answer["output"]) == (3, 2)
    # A version with an export is another one.
    with pytest.raises(RunError, match="no export"):
        registration.register_run("run-1", "required")
    assert register(folder) == made


def test_a_model_is_registered_without_a_graph_where_the_job_says_so() -> None:
    made = register(finished_run("run-1", export="never"))
    assert registry.show_model("line/1")["not_exported"] == "the job says `register.export: never`"
    again = registration.register_run("run-1", "required")
    assert (made.version, again) == (1, {"name": "line", "version": 2, "alias": "candidate"})


@pytest.mark.parametrize(("kind", "code"), [("good", 0), ("branching", 1)])
def test_the_tracking_process_registers_at_the_end_and_the_run_is_finished_either_way(kind: str, code: int) -> None:
    folder = finished_run("run-1", kind=kind, export="required")
    done = subprocess.run([*TRACKER, str(folder.path)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    run = mlflow_run(folder)
    assert run.info.status == "FINISHED"
    if kind == "good":
        version = {"name": "line", "version": 1, "alias": "candidate"}
        assert read_record(folder.model_version) == version
    else:
        assert "no export" in done.stderr
        failure = read_record(folder.tracking_failure)
        assert failure["refused"] is True
        assert tracking_summary(folder, delivered=False)["not_registered"] == failure["message"]
        assert not folder.model_version.exists()


def test_a_disk_that_is_full_registers_nothing_says_so_and_the_next_try_makes_the_first_version(state_folder: Path) -> None:
    # MLflow's artifacts get a disk of their own, smaller than the model is.
    on_full_disk = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=12k none "$1" && shift && exec "$@"', "sh"]
    artifacts = state_folder / "artifacts"
    folder = finished_run("run-1")
    artifacts.mkdir(exist_ok=True)
    if subprocess.run([*on_full_disk, str(artifacts), "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    full = subprocess.run(
        [*on_full_disk, str(artifacts), *TRACKER, str(folder.path), "--give-up-s=1"], capture_output=True, text=True
    )
    assert full.returncode == 1
    assert "No space left on device" in read_record(folder.tracking_failure)["message"]
    assert not folder.model_version.exists()
    assert registry.list_models() == []

    done = subprocess.run([*TRACKER, str(folder.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_record(folder.model_version) == {"name": "line", "version": 1, "alias": "candidate"}
    assert find_model("line@candidate").run_id == "run-1"


def test_the_files_of_a_version_in_a_local_store_are_not_copied(state_folder: Path) -> None:
    files = registry.model_files(register(finished_run("run-1")))
    assert files.is_relative_to(state_folder / "artifacts")


def test_damaged_weights_are_refused() -> None:
    folder = finished_run("run-1")
    path = folder.checkpoints / "step-00000009.1" / "weights.safetensors"
    save_file({name: tensor + 1 for name, tensor in weights_of(folder).items()}, path)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        register(folder)


def other_weights(files: Path) -> None:
    """Replace the weights by others of the same names, types and shapes."""
    weights = load_file(files / "weights.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, files / "weights.safetensors")


@pytest.mark.parametrize("name", [*VERSION_FILES, SIGNATURE, "checksums.json"])
def test_a_version_with_a_file_that_was_changed_or_is_gone_is_refused(name: str) -> None:
    made = register(finished_run("run-1"))
    file = registry.model_files(made) / name
    assert find_model("line/1").load_weights().keys() == weights_of(run_folder("run-1")).keys()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        find_model("line@candidate")
    file.unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        find_model("line@candidate")


def test_weights_whose_checksums_were_made_to_fit_are_still_not_those_that_the_registry_knows() -> None:
    made = register(finished_run("run-1"))
    files = registry.model_files(made)
    other_weights(files)
    directory.write_checksums(files)
    found = find_model("line/1")
    with pytest.raises(CheckpointError, match=f"line/1 .*{made.weights_sha256} were trained"):
        found.load_weights()
    with pytest.raises(CheckpointError, match=f"line/1 .*{made.weights_sha256} were trained"):
        raymill.model("line/1")


def test_a_run_that_has_not_ended_is_refused() -> None:
    folder = finished_run("run-1")
    folder.events.unlink()
    with pytest.raises(RunError, match="--resume run-1"):
        register(folder)


def test_an_unknown_model_names_the_nearest() -> None:
    register(finished_run("run-1"))
    cases: dict[str, Any] = {
        "lime@candidate": "Did you mean 'line@candidate'",
        "line@candidat": "Did you mean 'line@candidate'",
        "line/7": "Did you mean 'line/1'",
        "run-7": "Valid names",
        "a' or 1=1": "Valid names",
    }
    for reference, words in cases.items():
        with pytest.raises(InputError, match=words):
            registry.resolve(reference)
