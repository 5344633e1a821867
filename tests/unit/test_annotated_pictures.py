"""Boxes as of Pascal VOC and COCO, and masks: read as they are written; what is wrong is a bad row or names its file."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from probes import pictures
from raymill.data.bad_rows import read_good_rows
from raymill.data.manifest import take_manifest
from raymill.data.quality.check import check_rows
from raymill.data.rows import take
from raymill.data.sources import (
    CocoSource,
    ImageFolderSource,
    MaskSource,
    VocSource,
    broken_pictures,
    decode_images,
    decode_masks,
)
from raymill.errors import DataError, InputError
from raymill.task import Pipeline, Rows, Source

NUM = pictures.NUM_PICTURES


def all_rows(source: Source) -> Rows:
    """Read by a copy, as another process has it."""
    [fragment] = pickle.loads(pickle.dumps(source)).fragments()
    rows = pickle.loads(pickle.dumps(source)).read(fragment)
    order = sorted(range(len(rows["path"])), key=lambda row: Path(rows["path"][row]).stem)
    assert order != list(range(len(order))), "they come mixed"
    return take(rows, np.array(order))


def bad(source: Source) -> list[str]:
    """Why each bad row is bad."""
    [fragment] = source.fragments()
    pipeline = Pipeline(sources={"train": source}, schema=source.schema)  # type: ignore[attr-defined]
    good, reasons = read_good_rows(pipeline, "train", fragment, lenient=True)
    assert len(next(iter(good.values()), [])) + len(reasons) == fragment.num_rows
    with pytest.raises(DataError, match=r"Correct|Restore|is of no class|Leave|Delete"):
        read_good_rows(pipeline, "train", fragment, lenient=False)
    return sorted(reasons.values())


def refused(source: Source) -> str:
    with pytest.raises(InputError) as caught:
        source.fragments()
    return str(caught.value)


# ---------------------------------------------------------------- boxes


def test_boxes_of_voc_and_of_coco_are_read_alike(tmp_path: Path) -> None:
    pictures.write_voc(tmp_path / "voc")
    pictures.write_coco(tmp_path / "coco")
    voc, coco = VocSource(str(tmp_path / "voc")), CocoSource(str(tmp_path / "coco"), "boxes.json", "pictures")
    assert (voc.names, coco.names) == (pictures.CLASSES, pictures.CLASSES)
    one, other = all_rows(voc), all_rows(coco)
    for rows in (one, other):
        assert [boxes.tolist() for boxes in rows["boxes"]] == [[[1, 2, 12, 9]]] * NUM
        assert [labels.tolist() for labels in rows["labels"]] == [[number % 2] for number in range(NUM)]
        assert {boxes.dtype.name for boxes in rows["boxes"]} == {"float32"}
    assert one["image"] == other["image"]
    assert (one["path"][3], other["path"][3]) == ("003.png", "pictures/003.png")
    taken = take_manifest(Pipeline(sources={"train": voc, "validation": coco}, schema=voc.schema), lenient=False)
    assert taken.splits["train"].num_rows == NUM


def test_files_of_boxes_may_lie_in_a_folder_of_their_own_and_hold_none(tmp_path: Path) -> None:
    pictures.write_voc(tmp_path / "JPEGImages")
    (tmp_path / "Annotations").mkdir()
    for path in (tmp_path / "JPEGImages").glob("*.xml"):
        path.rename(tmp_path / "Annotations" / path.name)
    (tmp_path / "Annotations" / "000.xml").write_text("<annotation/>")
    rows = all_rows(VocSource(str(tmp_path)))
    assert [boxes.shape for boxes in rows["boxes"]] == [(0, 4)] + [(1, 4)] * (NUM - 1)
    assert rows["boxes"][0].dtype == np.float32


BOX = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (BOX.format("dark", 0, 0, 13, 5), "box 0 (dark: 0, 0, 13, 5) reaches out of the picture, which has 12 x 10 pixels"),
        (BOX.format("dark", -1, 0, 3, 5), "reaches out of the picture"),
        (BOX.format("dark", 5, 0, 5, 5), "is empty: left, top, right, bottom are expected"),
        (BOX.format("dark", "nan", 0, 5, 5), "is empty"),
        (BOX.format("drak", 1, 0, 5, 5), "is of no class. Did you mean 'dark'?"),
        (BOX.format("dark", "one", 0, 5, 5), "is no file of Pascal VOC: could not convert string to float"),
        ("<object><name>dark</name></object>", "an object without name, or without xmin"),
        ("<object>", "is no file of Pascal VOC: mismatched tag"),
    ],
)
def test_a_box_that_cannot_be_right_makes_a_bad_row(tmp_path: Path, content: str, said: str) -> None:
    pictures.write_voc(tmp_path)
    (tmp_path / "004.xml").write_text(f"<annotation>{content}</annotation>")
    [reason] = bad(VocSource(str(tmp_path), pictures.CLASSES))
    assert said in reason
    assert "004." in reason


@pytest.mark.parametrize(
    "entities",
    ['<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]>', '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>'],
)
def test_xml_that_would_be_expanded_or_read_a_file_is_a_bad_row(tmp_path: Path, entities: str) -> None:
    pictures.write_voc(tmp_path)
    (tmp_path / "004.xml").write_text(f"{entities}<annotation><object><name>&b;</name></object></annotation>")
    assert "004.xml: declares entities" in bad(VocSource(str(tmp_path), pictures.CLASSES))[0]


def test_a_picture_without_its_file_of_boxes_or_with_two_or_empty_files_are_refused(tmp_path: Path) -> None:
    pictures.write_voc(tmp_path)
    (tmp_path / "001.xml").rename(tmp_path / "1.xml")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "002.png").write_bytes((tmp_path / "002.png").read_bytes())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "003.xml").write_text("<annotation/>")
    (tmp_path / "003.xml").unlink()
    message = refused(VocSource(str(tmp_path)))
    assert "001.png: found no file 001.xml; expected one file with its boxes" in message
    assert "003.png: found a/003.xml and b/003.xml" in message
    assert "002.png" not in message, "the one beside it, or the only one"
    (tmp_path / "005.xml").write_text("")
    assert "005.xml: found an empty file" in refused(VocSource(str(tmp_path)))
    assert "no such folder" in refused(VocSource(str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("{", "Expecting property name"),
        ("[]", "boxes.json: found list indices"),
        ("{}", "no such number or name: 'categories'"),
        ('{"categories": [], "images": [], "annotations": [{"bbox": [1, 2, 3]}]}', "not enough values"),
        ("[" * 100_000, "recursion"),
        ('{"categories": [], "images": [{"id": 1, "file_name": "../../etc/passwd"}], "annotations": []}', "no such picture"),
        ('{"categories": [], "images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}], "annotations": []}', "twice"),
    ],
)
def test_a_file_that_is_none_of_coco_or_names_what_is_not_there_is_refused(tmp_path: Path, told: str, said: str) -> None:
    pictures.write_coco(tmp_path)
    (tmp_path / "boxes.json").write_text(told)
    assert said in refused(CocoSource(str(tmp_path), "boxes.json", "pictures"))


def test_a_box_of_coco_out_of_its_picture_is_a_bad_row_and_one_around_a_crowd_is_left_out(tmp_path: Path) -> None:
    pictures.write_coco(tmp_path)
    told = json.loads((tmp_path / "boxes.json").read_text())
    told["annotations"][4]["bbox"] = [5, 5, 8, 1]
    told["annotations"].append({**told["annotations"][5], "iscrowd": 1})
    (tmp_path / "boxes.json").write_text(json.dumps(told))
    source = CocoSource(str(tmp_path), "boxes.json", "pictures")
    [reason] = bad(source)
    assert "004.png: box 0 (bright: 5, 5, 13, 6) reaches out" in reason
    assert len(all_rows(source)["boxes"][5]) == 1
    assert len(all_rows(CocoSource(str(tmp_path), "boxes.json", "pictures", crowds=True))["boxes"][5]) == 2


@pytest.mark.parametrize("kind", ["voc", "coco", "masks"])
def test_what_was_changed_since_it_was_listed_is_noticed(tmp_path: Path, kind: str) -> None:
    write, _ = pictures.KINDS[kind]
    write(tmp_path)
    sources = {"voc": VocSource(str(tmp_path)), "coco": CocoSource(str(tmp_path), "boxes.json", "pictures")}
    source = sources.get(kind, MaskSource(str(tmp_path)))
    [fragment] = source.fragments()
    assert len(source.read(fragment)["path"]) == NUM
    changed = {"voc": "003.xml", "coco": "pictures/003.png", "masks": "masks/003.png"}[kind]
    (tmp_path / changed).write_bytes((tmp_path / changed).read_bytes() + b" ")
    with pytest.raises(DataError, match="they have changed since the run's manifest was taken"):
        source.read(fragment)
    (tmp_path / changed).unlink()
    with pytest.raises((DataError, InputError), match="003"):
        source.read(fragment)


def test_boxes_of_coco_that_were_changed_are_noticed_by_another_process(tmp_path: Path) -> None:
    pictures.write_coco(tmp_path)
    source = CocoSource(str(tmp_path), "boxes.json", "pictures")
    [fragment] = source.fragments()
    told = json.loads((tmp_path / "boxes.json").read_text())
    told["annotations"][4]["bbox"] = [1, 1, 2, 2]
    (tmp_path / "boxes.json").write_text(json.dumps(told))
    # The file is read once in each process.
    other = CocoSource(str(tmp_path), "./boxes.json", "pictures")
    with pytest.raises(DataError, match="have changed"):
        other.read(fragment)


# ---------------------------------------------------------------- masks


def test_masks_are_numbers_whatever_they_are_written_in(tmp_path: Path) -> None:
    pictures.write_masks(tmp_path)
    Image.fromarray(np.full((10, 12), 40_000, np.uint16)).save(tmp_path / "masks" / "000.tif")
    (tmp_path / "masks" / "000.png").unlink()
    palette = Image.fromarray(np.full((10, 12), 3, np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 9, 9, 9, 1, 2, 3])
    palette.save(tmp_path / "masks" / "001.png")
    rows = all_rows(MaskSource(str(tmp_path)))
    masks = decode_masks(rows["mask"], names=rows["path"])
    assert [int(mask.max()) for mask in masks[:4]] == [40_000, 3, 0, 1]
    assert {(mask.shape, mask.dtype.name) for mask in masks} == {((10, 12), "int64")}
    assert decode_masks(rows["mask"], (5, 6)).shape == (NUM, 5, 6)  # type: ignore[union-attr]
    assert len(decode_images(rows["image"])) == NUM
    with pytest.raises(DataError, match="mask 0: a mask of mode 'RGB'"):
        decode_masks(rows["image"][:1])


def test_a_mask_of_another_size_or_that_is_none_makes_a_bad_row(tmp_path: Path) -> None:
    pictures.write_masks(tmp_path)
    Image.new("L", (12, 11)).save(tmp_path / "masks" / "002.png")
    (tmp_path / "masks" / "003.png").write_bytes(b"no picture")
    found = bad(MaskSource(str(tmp_path)))
    assert "masks/002.png: a mask of 12 x 11 pixels for a picture of 12 x 10" in found[0]
    assert "masks/003.png: is no whole picture" in found[1]


def test_what_has_no_partner_and_a_link_that_leads_out_are_refused(tmp_path: Path) -> None:
    pictures.write_masks(tmp_path / "set")
    (tmp_path / "set" / "masks" / "002.png").unlink()
    (tmp_path / "set" / "images" / "003.png").rename(tmp_path / "set" / "images" / "3.png")
    message = refused(MaskSource(str(tmp_path / "set")))
    assert "images/002.png: found no file masks/002.*; expected one for each of images" in message
    assert "masks/003.png: found no file images/003.*" in message
    os.symlink("/etc/passwd", tmp_path / "set" / "images" / "x.png")
    assert "x.png: found a link that leads elsewhere" in refused(MaskSource(str(tmp_path / "set")))


# ---------------------------------------------------------------- all of it, by `data check`


def test_a_class_without_examples_is_named(tmp_path: Path) -> None:
    pictures.write_folders(tmp_path)
    (tmp_path / "grey").mkdir()
    source: Any = ImageFolderSource(str(tmp_path))
    pipeline = Pipeline(sources={"train": source}, schema=source.schema)
    assert check_rows(pipeline, take_manifest(pipeline))["train"]["classes_without_rows"] == {"label": [2]}
    whole: Any = ImageFolderSource(str(tmp_path), pictures.CLASSES)
    pipeline = Pipeline(sources={"train": whole}, schema=whole.schema)
    assert "classes_without_rows" not in check_rows(pipeline, take_manifest(pipeline))["train"]


def test_pictures_that_cannot_be_decoded_are_bad_rows_where_the_pipeline_checks_them(tmp_path: Path) -> None:
    pictures.write_voc(tmp_path)
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 12, 3)).astype(np.uint8)).save(whole, "PNG")
    (tmp_path / "006.png").write_bytes(whole.getvalue()[:-60])
    source: Any = VocSource(str(tmp_path), pictures.CLASSES)
    pipeline = Pipeline(sources={"train": source, "validation": source}, schema=source.schema, check=broken_pictures)
    with pytest.raises(InputError) as caught:
        check_rows(pipeline, take_manifest(pipeline, lenient=False))
    assert "is no whole picture" in str(caught.value)
    _, reasons = read_good_rows(pipeline, "train", source.fragments()[0], lenient=True)
    assert [source.read(source.fragments()[0])["path"][row] for row in reasons] == ["006.png"]
