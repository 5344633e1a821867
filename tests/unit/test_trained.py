"""The weights of a run or of a registered version: those that were trained, or an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymill.checkpoint import snapshot
from raymill.checkpoint.commit import commit
from raymill.checkpoint.directory import CHECKSUMS, WEIGHTS, write_checksums
from raymill.checkpoint.snapshot import Snapshot, weights_sha256
from raymill.config import load
from raymill.config.plan import ClusterFacts, make_plan
from raymill.config.spec import JobSpec
from raymill.data.manifest import Manifest, SplitManifest
from raymill.errors import CheckpointError, InputError
from raymill.files import write_record
from raymill.models import registry
from raymill.models.find import find_model
from raymill.models.registry import ModelVersion
from raymill.record.folder import run_folder
from raymill.task import Fragment, Task
from raymill.trained.model import VERSION_FILES

SPEC = JobSpec.model_validate({"name": "job", "task": "a:B", "pipeline": "a:b", "optimizer": {"kind": "SGD"}})
MANIFEST = Manifest({"train": SplitManifest((Fragment("file", 0, 100, 1000, ""),))})
PLAN = make_plan(SPEC, MANIFEST, ClusterFacts(num_cpus=4, num_gpus=0, memory_bytes=2**33))
TRAINED = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


class Linear(Task):
    """Builds what the weights are of."""

    def build(self) -> torch.nn.Module:
        return torch.nn.Linear(3, 2)


def run() -> tuple[str, Path]:
    """A run with one checkpoint: its reference, and the folder of its weights."""
    folder = run_folder("job-1")
    folder.checkpoints.mkdir(parents=True)
    write_record(folder.spec, load.resolved(SPEC))
    write_record(folder.plan, PLAN.as_record())
    taken = Snapshot(TRAINED, {}, {"step": 7, "position": 70})
    name = commit(folder.checkpoints, 1, 1, snapshot.content(taken, best=True), best=True)
    return "job-1", folder.checkpoints / name


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A registered version: its reference, and the folder of its files."""
    files = tmp_path / "version"
    files.mkdir()
    write_record(files / "spec.json", load.resolved(SPEC))
    write_record(files / "plan.json", PLAN.as_record())
    write_record(files / "data_manifest.json", {"digest": "ab12"})
    save_file(TRAINED, files / WEIGHTS)
    write_checksums(files)
    made = ModelVersion("digits", 3, "candidate", "job-1", {}, weights_sha256(TRAINED))
    monkeypatch.setattr(registry, "resolve", {"digits/3": made}.__getitem__)
    monkeypatch.setattr(registry, "model_files", lambda version: {"models:/digits/3": files}[version.uri])
    return "digits/3", files


@pytest.fixture(params=["run", "version"])
def stored(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """Each of both."""
    found: tuple[str, Path] = run() if request.param == "run" else request.getfixturevalue("version")
    return found


def test_the_weights_are_those_that_were_trained(stored: tuple[str, Path]) -> None:
    reference, files = stored
    trained = find_model(reference)
    assert (trained.name, trained.run_id, trained.weights) == (reference, "job-1", files / WEIGHTS)
    assert (trained.spec, trained.plan) == (SPEC, PLAN)
    torch.testing.assert_close(dict(trained.load_weights()), TRAINED, rtol=0, atol=0)
    model = trained.build(Linear())
    torch.testing.assert_close(model.state_dict(), TRAINED, rtol=0, atol=0)
    assert not model.training


def test_changed_bytes_of_the_weights_are_refused(stored: tuple[str, Path]) -> None:
    reference, files = stored
    content = bytearray((files / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (files / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: size or SHA-256 is not what checksums\.json says"):
        find_model(reference)


def test_other_weights_with_checksums_to_match_are_refused_by_the_hash_on_record(stored: tuple[str, Path]) -> None:
    reference, files = stored
    other = load_file(files / WEIGHTS)
    other["bias"][0] = 1.5
    save_file(other, files / WEIGHTS)
    write_checksums(files)
    trained = find_model(reference)
    for read in (trained.load_weights, lambda: trained.build(Linear())):
        with pytest.raises(CheckpointError) as caught:
            read()
        said = str(caught.value)
        assert (
            f"the weights of {reference} have SHA-256 {weights_sha256(other)}, but {weights_sha256(TRAINED)} were trained" in said
        )
        assert "Restore it, or train the model again" in said


def drop_checksums(files: Path) -> None:
    (files / CHECKSUMS).unlink()


def drop_weights(files: Path) -> None:
    (files / WEIGHTS).unlink()


def add_a_file(files: Path) -> None:
    (files / "code.py").write_text("print('hello')")
    write_checksums(files)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_checksums, r"no regular file checksums\.json"),
        (drop_weights, r"weights\.safetensors: missing"),
        (add_a_file, r"its checksums\.json names \['code\.py'"),
    ],
)
def test_files_that_are_not_all_and_only_those_of_the_model_are_refused(
    change: Callable[[Path], None], said: str, stored: tuple[str, Path]
) -> None:
    reference, files = stored
    change(files)
    with pytest.raises(CheckpointError, match=said):
        find_model(reference)


@pytest.mark.parametrize("name", VERSION_FILES)
def test_every_file_of_a_version_is_verified(name: str, version: tuple[str, Path]) -> None:
    reference, files = version
    (files / name).write_bytes((files / name).read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        find_model(reference)


def test_weights_that_were_replaced_after_they_were_found_are_refused(stored: tuple[str, Path]) -> None:
    reference, files = stored
    trained = find_model(reference)
    (files / WEIGHTS).write_bytes(b"not even safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: cannot be read"):
        trained.load_weights()


def test_a_run_is_its_best_checkpoint() -> None:
    reference, first = run()
    for step, best in ((8, False), (9, True), (10, False)):
        taken = Snapshot(TRAINED, {}, {"step": step, "position": 10 * step})
        commit(first.parent, 1, 10, snapshot.content(taken, best=best), best=best)
    assert find_model(reference).weights.parent.name == "step-00000009.1"


def test_what_is_no_name_of_a_run_is_never_looked_up_as_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    asked: list[str] = []

    def resolve(reference: str) -> ModelVersion:
        asked.append(reference)
        raise InputError([])

    monkeypatch.setattr(registry, "resolve", resolve)
    for reference in ("../runs/job-1", "./job-1", "job-1/", "digits@candidate"):
        with pytest.raises(InputError):
            find_model(reference)
    assert asked == ["../runs/job-1", "./job-1", "job-1/", "digits@candidate"]
