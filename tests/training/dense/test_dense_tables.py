"""Data sets of Hugging Face's `datasets` on disk, for detectors and segmenters."""

import json

import datasets
import folders
import numpy as np
import pytest
from PIL import Image

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.image_records import CorruptImage
from mesa_train.training.dense import coco, fit, tables
from mesa_train.training.dense.composed import write_maps
from mesa_train.training.dense.config import of_dict
from mesa_train.training.dense.loader import DetectionSamples, read_picture
from mesa_train.training.dense.maps import read_map

NAMES = ["zero", "one", "two"]
SPLITS = {"train": "train", "validation": "val"}
CATEGORIES = {
    "named": (datasets.ClassLabel(names=NAMES), lambda key: key - 1),
    "text": (datasets.Value("string"), lambda key: NAMES[key - 1]),
    "gaps": (datasets.Value("int64"), lambda key: {1: 7, 2: 18, 3: 100}[key]),
}


def rows_of(folder, split, category=lambda key: key - 1, sizes=True):
    """The rows of a folder of COCO's: lists of objects, with their keys in COCO's order."""
    values = json.loads(folders.annotations(folder, split).read_text())
    for image in values["images"]:
        own = [a for a in values["annotations"] if a["image_id"] == image["id"]]
        size = {key: image[key] for key in ("width", "height")} if sizes else {}
        objects = [
            {"bbox": a["bbox"], "category": category(a["category_id"]), "iscrowd": a["iscrowd"],
             "segmentation": json.dumps(a["segmentation"])}
            for a in own
        ]  # fmt: skip
        yield {"image": str(folder / split / image["file_name"]), **size, "objects": objects}


def saved(folder, out, kind="named", sizes=True, edit=None):
    """A DatasetDict on disk, of the pictures of a folder of COCO's."""
    feature, category = CATEGORIES[kind]
    found = {}
    for name, split in SPLITS.items():
        rows = list(rows_of(folder, split, category, sizes))
        for row in rows:
            for entry in row["objects"]:
                entry.pop("segmentation")
        if edit is not None and name == "train":
            edit(rows)
        one = {"bbox": datasets.List(datasets.Value("float32")), "category": feature}
        features = {
            "image": datasets.Image(),
            "objects": [one | {"iscrowd": datasets.Value("int8")}],
        }
        if sizes:
            features |= {key: datasets.Value("int64") for key in ("width", "height")}
        found[name] = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    datasets.DatasetDict(found).save_to_disk(out)
    return str(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders.coco_folder(tmp_path_factory.mktemp("coco"))


def same(data, wanted):
    for picture, other in zip(data.pictures, wanted.pictures, strict=True):
        ours, theirs = picture.objects, other.objects
        assert np.allclose(ours.boxes, theirs.boxes)
        assert [data.names[i] for i in ours.labels] == [wanted.names[i] for i in theirs.labels]
        assert (ours.height, ours.width) == (theirs.height, theirs.width)
        image, file = read_picture(picture.path), read_picture(other.path)
        assert (image == file).all()


@pytest.mark.parametrize("kind", list(CATEGORIES))
@pytest.mark.parametrize("sizes", [True, False])
def test_a_saved_data_set_has_the_objects_of_its_folder(folder, tmp_path, kind, sizes):
    data = tables.detection(saved(folder, tmp_path / "saved", kind, sizes), "train")
    wanted = coco.load(folders.annotations(folder), folder / "train")
    names = {"named": ("zero", "one", "two"), "text": ("one", "two", "zero")}
    if kind == "gaps":
        assert data.names == ("7", "18", "100")
        data = type(data)(data.file, data.pictures, tuple(NAMES), data.category_ids)
    else:
        assert data.names == names[kind]
    same(data, wanted)


def test_a_folder_of_parquet_files_with_objects_of_lists_and_corners(folder, tmp_path):
    for name, split in SPLITS.items():
        rows = []
        for row in rows_of(folder, split):
            corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in row["objects"])]
            labels = [a["category"] for a in row["objects"]]
            rows.append({"picture": row["image"], "things": {"boxes": corners, "label": labels}})
        made = datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image())
        made.to_parquet(tmp_path / f"{name}.parquet")
    keys = {"image_key": "picture", "objects_key": "things", "boxes": "xyxy"}
    data = tables.detection(str(tmp_path), "train", **keys)
    wanted = coco.load(folders.annotations(folder), folder / "train")
    assert data.names == ("0", "1", "2")
    same(type(data)(data.file, data.pictures, tuple(NAMES), data.category_ids), wanted)


def test_masks_are_polygons_or_run_lengths(folder, tmp_path):
    rows = list(rows_of(folder, "train"))
    for row in rows:
        for entry in row["objects"]:
            entry["segmentation"] = json.loads(entry["segmentation"])
    rows[0]["objects"][0]["segmentation"] = {"size": [1, 1], "counts": "x"}
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "wrong")
    with pytest.raises(ConfigError, match=r"train\[0\]: objects\[0\].segmentation.size must be"):
        tables.detection(str(tmp_path / "wrong"), "train", masks=True)
    made = made.select(range(1, len(rows)))
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "right")
    data = tables.detection(str(tmp_path / "right"), "train", masks=True)
    wanted = coco.load(folders.annotations(folder), folder / "train", masks=True)
    for picture, other in zip(data.pictures, wanted.pictures[1:], strict=True):
        assert (picture.objects.masks() == other.objects.masks()).all()


def strange(rows):
    rows[0]["objects"].append({"bbox": [4, 4, 40, 40], "category": 1, "iscrowd": 1})
    rows[0]["objects"].append({"bbox": [5, 5, 0, 12], "category": 1, "iscrowd": 0})
    rows[1]["objects"] = []


def test_crowds_flat_boxes_and_empty_pictures_are_kept_and_not_trained_on(folder, tmp_path, caplog):
    data = tables.detection(saved(folder, tmp_path / "saved", edit=strange), "train")
    first = data.pictures[0].objects
    assert first.trained.tolist() == [True] * (len(first.boxes) - 2) + [False] * 2
    assert first.ignored.tolist() == [False] * (len(first.boxes) - 2) + [True, False]
    assert "1 objects without area are not trained on" in caplog.text
    assert len(data.for_training(0).pictures) == 3


WRONG = [
    (lambda rows: rows[2]["objects"][0].update(bbox=[1.0, 2, 3]),
     r"train\[2\]: objects\[0\].bbox must be \[x, y, width, height\], got \[1.0, 2.0, 3.0\]"),
    (lambda rows: rows[1]["objects"][0].update(category=-1),
     r"train\[1\]: objects\[0\].category must be one of 0, 1, 2, got -1"),
    (lambda rows: rows[1]["objects"][0].update(bbox=[1.0, 2, float("nan"), 4]), r"bbox must be .* nan"),
    (lambda rows: rows[0]["objects"][0].update(iscrowd=3), r"iscrowd must be 0 or 1, got 3"),
    (lambda rows: rows[0]["objects"][0].update(category=None), r"objects\[0\] has no category"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_objects_are_one_line(folder, tmp_path, number):
    edit, message = WRONG[number]
    with pytest.raises(ConfigError, match=message) as error:
        tables.detection(saved(folder, tmp_path / "saved", edit=edit), "train")
    assert "\n" not in str(error.value)


def test_a_category_that_the_training_lacks_is_refused(folder, tmp_path):
    path = saved(folder, tmp_path / "saved", "gaps")
    # 1 is a label, and no category of the training's split.
    with pytest.raises(ConfigError, match=r"category must be one of 0, 1, got (7|18|100)"):
        tables.detection(path, "validation", classes=("0", "1"))


def test_wrong_tables_are_one_line(folder, tmp_path):
    path = saved(folder, tmp_path / "saved")
    for options, message in (
        ({"split": "test"}, r"no split 'test'; it has train, validation"),
        (
            {"image_key": "img"},
            r"data.image_key: .* has no column 'img'; it has image, width, height",
        ),
        (
            {"objects_key": "width", "image_key": "objects"},
            r"image_key=objects: the column holds no",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            tables.detection(path, **({"split": "train"} | options))
    datasets.load_from_disk(path)["train"].save_to_disk(tmp_path / "one")
    with pytest.raises(ConfigError, match="holds one split without a name; save a DatasetDict"):
        tables.detection(str(tmp_path / "one"), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data.path=.*empty: ") as error:
        tables.detection(str(tmp_path / "empty"), "train")
    assert "\n" not in str(error.value)


def test_a_picture_of_another_size_is_refused_with_its_row(folder, tmp_path):
    path = saved(folder, tmp_path / "saved", edit=lambda rows: rows[3].update(width=99))
    samples = DetectionSamples(tables.detection(path, "train"), None, 0, masks=False)
    with pytest.raises(CorruptImage, match=r"train\[3\] has 64 x 80 pixels .* says 64 x 99"):
        samples[0, 3]


def config(kind, path, out, **data):
    augment = {"crop": 64} if kind == "semantic_fpn" else {}
    return of_dict({
        "model": {"kind": kind, "backbone": "litv2_tiny", "classes": data.pop("classes", None)},
        "data": {"format": "datasets", "path": path, "short_side": 64, "long_side": 80} | data,
        "augment": augment,
        "train": {
            "steps": 1, "global_batch": 2, "micro_batch": 2, "device": "cpu", "precision": "no",
            "pictures": 1, "out": str(out),
        },
    })  # fmt: skip


def test_a_detector_trains_on_a_saved_data_set(folder, tmp_path):
    path = saved(folder, tmp_path / "saved", "text")
    run = fit.prepare(config("retinanet", path, tmp_path / "run", workers=1))
    scores = fit.fit(run)
    assert run.task.names == ("one", "two", "zero")
    assert 0 <= scores["ap"] <= 1
    assert (tmp_path / "run/predictions.png").is_file()


def test_a_segmenter_trains_on_maps_in_a_table(tmp_path):
    write_maps(tmp_path / "ade", {"training": 4, "validation": 2}, **folders.OPTIONS)
    found = {}
    for name, split in (("train", "training"), ("validation", "validation")):
        paths = sorted((tmp_path / "ade/images" / split).glob("*.png"))
        maps = [tmp_path / "ade/annotations" / split / path.name for path in paths]
        columns = {"image": list(map(str, paths)), "annotation": list(map(str, maps))}
        made = datasets.Dataset.from_dict(columns)
        for key in columns:
            made = made.cast_column(key, datasets.Image())
        found[name] = made
    datasets.DatasetDict(found).save_to_disk(tmp_path / "saved")
    data = tables.segmentation(str(tmp_path / "saved"), "train")
    paths = sorted((tmp_path / "ade/images/training").iterdir())
    for (image, labels), path in zip(data.pairs, paths, strict=True):
        assert (read_picture(image) == read_picture(str(path))).all()
        file = tmp_path / "ade/annotations/training" / path.name
        ours = read_map(labels, 5, zero_ignored=True)
        assert (ours == read_map(str(file), 5, zero_ignored=True)).all()
    with pytest.raises(CorruptImage, match=r"train\[\d\].annotation has the value \d at row"):
        [read_map(labels, 2, zero_ignored=True) for _, labels in data.pairs]
    with pytest.raises(ConfigError, match=r"data.map_key: .* has no column 'label'"):
        tables.segmentation(str(tmp_path / "saved"), "train", map_key="label")
    run = fit.prepare(config("semantic_fpn", str(tmp_path / "saved"), tmp_path / "run", classes=5))
    assert 0 <= fit.fit(run)["miou"] <= 1


def test_a_turned_picture_has_the_size_it_is_seen_in(tmp_path):
    picture = Image.new("RGB", (80, 64))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    objects = [[{"bbox": [1.0, 2.0, 10.0, 12.0], "category": "a"}]]
    made = datasets.Dataset.from_dict({"image": [str(tmp_path / "turned.jpg")], "objects": objects})
    made = made.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved")
    data = tables.detection(str(tmp_path / "saved"), "train")
    assert (data.pictures[0].objects.height, data.pictures[0].objects.width) == (80, 64)
    samples = DetectionSamples(data, None, 0, masks=False)
    assert samples[0, 0]["image"].shape == (3, 80, 64)
