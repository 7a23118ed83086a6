"""Folders of COCO, VOC and ADE20K: what strangers have is read, or refused in one line."""

import folders
import numpy as np
import pytest
from PIL import Image

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.image_records import CorruptImage
from mesa_train.training.dense import coco, maps, run_lengths, voc
from mesa_train.training.dense.composed import scenes, write_maps, write_voc
from mesa_train.training.dense.loader import DetectionSamples


def load(folder, split="train", masks=True):
    return coco.load(folders.annotations(folder, split), folder / split, masks=masks)


def test_scenes_are_the_same_again_and_split_apart():
    options = {"size": (64, 80), "sides": (16, 30)}
    once, again = (list(scenes(3, **options)) for _ in range(2))
    for one, two in zip(once, again, strict=True):
        assert (one.image == two.image).all()
        assert (one.boxes == two.boxes).all()
        for box, mask, label in zip(one.boxes.astype(int), one.masks, one.labels, strict=True):
            x1, y1, x2, y2 = box
            assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0
            assert (one.classes[mask] == label + 1).all()
        assert one.masks.sum(0).max() <= 1
    held_out = next(scenes(1, held_out=True, **options))
    assert not (held_out.image == once[0].image).all()
    with pytest.raises(ValueError, match=r"digits must be a choice of 0 to 9, got \[3, 12\]"):
        next(scenes(1, digits=[3, 12]))


def test_a_folder_of_coco_comes_back(tmp_path):
    data = load(folders.coco_folder(tmp_path))
    assert (data.names, data.category_ids) == (("zero", "one", "two"), (1, 2, 3))
    for picture, scene in zip(data.pictures, scenes(4, **folders.OPTIONS), strict=True):
        objects = picture.objects
        assert objects.trained.all()
        assert (objects.boxes == scene.boxes).all()
        assert (objects.labels == scene.labels).all()
        assert (objects.masks() == scene.masks).all()


def test_strange_annotations_are_read(tmp_path, caplog):
    data = load(folders.strange_folder(tmp_path))
    assert data.category_ids == (7, 18, 90)
    assert len(data.pictures) == 5
    first = data.pictures[0].objects
    ordinary = len(first.boxes) - 5
    # The crowd region, the two flat boxes and the box outside are no targets.
    assert first.trained.tolist() == [True] * ordinary + [False] * 4 + [True]
    assert first.ignored.tolist() == [False] * ordinary + [True] + [False] * 4
    assert first.targets()[-1].tolist() == [60.5, 40.25, 80, 60.25]
    assert first.masks().shape == (ordinary + 1, *folders.SIZE)
    assert first.masks()[-1].sum() == pytest.approx(19.5 * 20, abs=30)
    assert "3 objects without area are not trained on; the first is annotations[" in caplog.text
    trained = data.for_training(32)
    assert len(trained.pictures) == 4
    assert "1 pictures without a target are not trained on" in caplog.text
    samples = DetectionSamples(data, None, 0, masks=False)
    for index in range(5):
        image = samples[0, index]["image"]
        assert image.shape == (3, *folders.SIZE)
    # 16 bits are scaled, not clipped.
    assert 120 < samples[0, 0]["image"].float().mean() < 135


def of(section, index=0, **changes):
    return lambda values: values[section][index].update(changes)


REFUSED = [
    (of("images", file_name="gone.png"), r"images\[0\].file_name names no picture: .*gone.png; 1 of 4 are missing"),
    (of("images", height=0), r"images\[0\].height must be a positive integer, got 0"),
    (of("images", 1, width=None), r"images\[1\].width must be a positive integer, got nothing"),
    (of("images", 1, id=1), r"images\[1\].id is 1, as of images\[0\]"),
    (of("annotations", 2, image_id=55), r"annotations\[2\].image_id is the id of no image, got 55"),
    (of("annotations", category_id=0), r"annotations\[0\].category_id must be one of 1, 2, 3, got 0"),
    (of("annotations", bbox=[1, 2, 3]), r"annotations\[0\].bbox must be \[x, y, width, height\], got \[1, 2, 3\]"),
    (of("annotations", bbox=[9, 9, -4, 5]), r"annotations\[0\].bbox must be \[x, y, width, height\], got \[9, 9, -4"),
    (of("annotations", bbox=[9, 9, float("nan"), 5]), r"annotations\[0\].bbox must be .*, got \[9, 9, nan, 5\]"),
    (of("annotations", iscrowd=2), r"annotations\[0\].iscrowd must be 0 or 1, got 2"),
    (of("annotations", area="big"), r"annotations\[0\].area must be a number, got 'big'"),
    (of("annotations", segmentation=None), r"segmentation must be polygons or run lengths, got nothing"),
    (of("annotations", segmentation=[[1, 2, 3, 4, 5, 6, 7]]), r"segmentation has a polygon of 7 numbers"),
    (of("annotations", segmentation={"size": [9, 9], "counts": "x"}), r"size must be \[64, 80\], got \[9, 9\]"),
    (of("annotations", segmentation={"size": [64, 80], "counts": [9]}), r"segmentation.counts cover 9 of 5120 pixels"),
    (of("annotations", segmentation={"size": [64, 80], "counts": "0"}), r"segmentation.counts cover 0 of 5120 pixels"),
    (of("annotations", segmentation={"size": [64, 80], "counts": "zz~"}), r"segmentation.counts is damaged: 'zz~'"),
    (of("annotations", segmentation=[[0, 0, 1e10, 0, 1e10, 1e10, 0, 1e10]]), r"polygons within 100000 pixels, got"),
    (of("annotations", segmentation=[[0, 0, -2e5, 0, 9, 9]]), r"polygons within 100000 pixels, got"),
    (of("annotations", segmentation=[[0, 0, 10**400, 0, 9, 9]]), r"must have polygons of numbers, got"),
    (of("annotations", segmentation={"size": [64, 80], "counts": [-1, 5121]}), r"counts must be integers from 0 on"),
    (of("annotations", segmentation={"size": [64, 80], "counts": "P" * 30 + "0"}), r"counts is damaged: 'PPP"),
    (of("annotations", bbox=[0, 0, 1e300, 1e300]), r"bbox must be within 100000 pixels, got \[0, 0, 1e\+300"),
    (of("annotations", area=10**400), r"annotations\[0\].area must be a number, got 1000"),
    (of("images", height=10**9, width=10**9), r"images\[0\] says 1000000000 x 1000000000 pixels, more than"),
    (of("images", height=90_000, width=90_000), r"images\[0\] says 90000 x 90000 pixels, more than"),
    (lambda v: v.pop("categories"), r"categories must be a list, got nothing"),
    (of("categories", id=2), r"categories\[1\].id is 2, as of another category"),
    (lambda v: v.update(images=[]), r"images is empty"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_wrong_annotations_are_refused_in_one_line(tmp_path, number):
    edit, message = REFUSED[number]
    folders.coco_folder(tmp_path)
    folders.change(tmp_path, edit)
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path)
    assert str(folders.annotations(tmp_path)) in str(error.value)
    assert "\n" not in str(error.value)


def test_exports_with_nulls_and_backslashes_are_read(tmp_path):
    folders.coco_folder(tmp_path)
    wanted = load(tmp_path).pictures

    def export(values):
        for image in values["images"]:
            image["file_name"] = f"..\\train\\{image['file_name']}"
        for entry in values["annotations"]:
            entry |= {"area": None, "iscrowd": None}

    folders.change(tmp_path, export)
    for picture, old in zip(load(tmp_path).pictures, wanted, strict=True):
        assert picture.path.endswith(f"/../train/{old.path.rsplit('/', 1)[1]}")
        assert (picture.objects.boxes == old.objects.boxes).all()
        assert picture.objects.trained.all()
        sides = old.objects.boxes[:, 2:] - old.objects.boxes[:, :2]
        assert (picture.objects.areas == sides.prod(1)).all()


@pytest.mark.parametrize("area", [0, -3.5])
def test_a_box_counts_if_its_area_is_not_positive(tmp_path, caplog, area):
    folders.coco_folder(tmp_path)
    before = load(tmp_path, masks=False).for_training(32)
    folders.change(tmp_path, lambda values: [a.update(area=area) for a in values["annotations"]])
    data = load(tmp_path, masks=False).for_training(32)
    count = sum(len(picture.objects.boxes) for picture in data.pictures)
    assert len(data.pictures) == len(before.pictures)
    assert (
        f"{count} objects have area 0 or less beside a box, whose area is used; the first is "
        "annotations[0]"
    ) in caplog.text
    assert data.pictures[0].objects.areas.min() > 100


def test_without_a_box_of_a_pixel_the_message_says_what_a_target_is(tmp_path):
    folders.coco_folder(tmp_path)
    folders.change(tmp_path, lambda v: [a.update(bbox=[1, 1, 0, 9]) for a in v["annotations"]])
    with pytest.raises(
        ConfigError, match=r"none of 4 pictures has a target, a box of at least one"
    ):
        load(tmp_path, masks=False).for_training(32)


def test_run_lengths_in_text_are_pycocotools():
    random = np.random.default_rng(0)
    for shape, share in (
        ((9, 7), 0.5),
        ((64, 300), 0.01),
        ((3, 3), 1.0),
        ((40, 1), 0.0),
        ((90, 90), 0.3),
    ):
        mask = random.random(shape) < share
        flat = mask.T.reshape(-1)
        ends = np.flatnonzero(np.diff(flat)) + 1
        wanted = np.diff([0, *ends, flat.size]).tolist()
        wanted = [0, *wanted] if flat[0] else wanted
        text = run_lengths.encode(mask)["counts"]
        assert run_lengths.lengths(text) == wanted
        assert run_lengths.lengths(text[:-1]) != wanted
    assert run_lengths.lengths("P") is None
    assert run_lengths.lengths("~") is None


def test_files_that_are_no_annotations(tmp_path):
    folders.coco_folder(tmp_path)
    file = folders.annotations(tmp_path)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"the file is not JSON"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match=r"the file cannot be read: No such file"):
        load(tmp_path)


def test_boxes_need_no_segmentations(tmp_path):
    folders.coco_folder(tmp_path)
    folders.change(tmp_path, lambda values: [a.pop("segmentation") for a in values["annotations"]])
    assert load(tmp_path, masks=False).pictures[0].objects.segmentations is None


def test_pictures_that_do_not_fit_are_refused_with_their_name(tmp_path):
    data = load(folders.coco_folder(tmp_path))
    samples = DetectionSamples(data, None, 0, masks=False)
    path = tmp_path / "train/000001.png"
    Image.new("RGB", (80, 99)).save(path)
    with pytest.raises(
        CorruptImage, match=r"000001.png has 99 x 80 pixels .* images\[0\] says 64 x 80"
    ):
        samples[0, 0]
    path.write_bytes(b"no picture")
    with pytest.raises(CorruptImage, match=r"000001.png cannot be decoded"):
        samples[0, 0]


def test_a_folder_of_voc(tmp_path):
    write_voc(tmp_path, {"train": 4, "val": 2}, **folders.OPTIONS)
    data = voc.load(tmp_path, "train")
    assert data.names == ("one", "two", "zero")
    composed = scenes(4, **folders.OPTIONS)
    for picture, scene in zip(data.pictures, composed, strict=True):
        assert (picture.objects.boxes == scene.boxes).all()
        assert [data.names[i] for i in picture.objects.labels] == [
            ("zero", "one", "two")[i] for i in scene.labels
        ]
    file = tmp_path / "Annotations/train_000001.xml"
    text = file.read_text()
    file.write_text(text.replace("<difficult>0", "<difficult>1", 1))
    assert voc.load(tmp_path, "train").pictures[0].objects.ignored[0]
    for old, new, message in (
        ("<xmin>", "<xmin>x", r"object\[0\]/bndbox/xmin must be a number, got 'x"),
        ("<name>", "<name>un", r"object\[0\]/name must be one of one, two, zero, got 'un"),
        ("<width>80", "<width>", r"size/width must be a number, got"),
        ("</annotation>", "", r"the file is not XML"),
    ):
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(ConfigError, match=message):
            voc.load(tmp_path, "train", classes=data.names)
    with pytest.raises(ConfigError, match=r"test.txt: the list cannot be read"):
        voc.load(tmp_path, "test")


def test_folders_of_maps(tmp_path):
    write_maps(tmp_path, {"training": 3, "validation": 1}, **folders.OPTIONS)
    data = maps.load(tmp_path, "training")
    assert data.names == ("zero", "one", "two", "temple", "flower")
    path = data.pairs[0][1]
    scene = next(scenes(1, **folders.OPTIONS))
    labels = maps.read_map(path, 5, zero_ignored=True)
    assert (labels == np.where(scene.classes == 0, 255, scene.classes.astype(int) - 1)).all()
    # 16 bits, and palettes.
    Image.fromarray(scene.classes.astype(np.uint16)).save(path)
    assert (maps.read_map(path, 5, zero_ignored=True) == labels).all()
    palette = Image.fromarray(scene.classes).convert("P")
    palette.putdata(scene.classes.flatten().tolist())
    palette.save(path)
    assert (maps.read_map(path, 5, zero_ignored=True) == labels).all()
    with pytest.raises(
        CorruptImage,
        match=r"has the value \d at row \d+, column \d+; 3 classes have the values 1 to 3",
    ):
        maps.read_map(path, 3, zero_ignored=True)
    Image.fromarray(scene.image).save(path)
    with pytest.raises(CorruptImage, match=r"one channel, got a picture of mode RGB"):
        maps.read_map(path, 5, zero_ignored=True)
    (tmp_path / "annotations/training/000002.png").unlink()
    with pytest.raises(ConfigError, match=r"000002.png: the map does not exist; 1 of 3 do not"):
        maps.load(tmp_path, "training")
    with pytest.raises(ConfigError, match=r"the folder of the pictures does not exist"):
        maps.load(tmp_path, "testing")


def test_a_folder_of_vocs_maps(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    values = np.array([[0, 1], [255, 20]], np.uint8)
    Image.fromarray(values).save(tmp_path / "SegmentationClass/a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "JPEGImages/a.jpg")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\n")
    data = maps.load(tmp_path, "train", voc=True, zero_ignored=False)
    assert data.pairs[0][0].endswith("JPEGImages/a.jpg")
    assert (maps.read_map(data.pairs[0][1], 21, zero_ignored=False) == values).all()
