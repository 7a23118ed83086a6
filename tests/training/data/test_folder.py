"""A folder of images is read as it stands: splits, classes and names literally, oddities told."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import folder, sources
from mesa_train.training.data.config import DataConfig


def put(path, value=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path, format="PNG")


def images(root, classes=("cat", "dog"), count=1):
    for split in ("train", "validation"):
        for name in classes:
            for index in range(count):
                put(root / split / name / f"{index}.png", index)
    return root


def loaded(root, **options):
    return sources.load(DataConfig(source="imagefolder", path=str(root), **options), None)


def listed(root, **options):
    """({path: label} of training, {path: label} of validation), paths from the root on."""
    found = loaded(root, **options)
    both = []
    for records in (found.train, found.val):
        read = [records.read(i) for i in range(records.count)]
        both.append({os.path.relpath(path, root): label for path, label, _ in read})
    return tuple(both)


SPLIT_WORDS = ("dev", "eval", "test", "testing", "train", "training", "val", "valid", "validation")


def test_class_folders_named_after_splits_stay_in_their_split(tmp_path):
    root = images(tmp_path / "test" / "val_2024", SPLIT_WORDS)
    train, val = listed(root)
    assert train == {f"train/{name}/0.png": label for label, name in enumerate(SPLIT_WORDS)}
    assert val == {f"validation/{name}/0.png": label for label, name in enumerate(SPLIT_WORDS)}


def test_streamed_rows_are_those_of_the_split(tmp_path):
    root = images(tmp_path, ("cat", "train"), count=2)
    found = loaded(root, streaming=True, train_images=4)
    rows = list(found.train.stream.shuffle(seed=0, buffer_size=10))
    assert sorted(row["image"]["path"] for row in rows) == sorted(
        str(root / "train" / name / f"{i}.png") for name in ("cat", "train") for i in range(2)
    )
    again = list(found.train.stream.shuffle(seed=0, buffer_size=10))
    assert again == rows
    assert list(found.train.stream.shuffle(seed=1, buffer_size=10)) != rows
    assert found.train.read(rows[0])[:2] == (rows[0]["image"]["path"], rows[0]["label"])


def test_brackets_and_stars_are_no_patterns(tmp_path):
    root = images(tmp_path / "[2024] d*", ("cat [old]", "dog*", "d?g"))
    assert listed(root)[0] == {
        "train/cat [old]/0.png": 0, "train/d?g/0.png": 1, "train/dog*/0.png": 2,
    }  # fmt: skip


def test_classes_are_sorted_as_torchvision_sorts_them(tmp_path):
    from torchvision.datasets import ImageFolder

    root = images(tmp_path, ("10", "2", "b", "B", "a", "é"), count=2)
    put(root / "train/2/inner/7.png")
    ours = [(str(root / path), label) for path, label in listed(root)[0].items()]
    assert sorted(ours) == sorted(ImageFolder(str(root / "train")).samples)


def test_odd_files_are_passed_over_and_told_in_a_line(tmp_path, caplog):
    root = images(tmp_path)
    put(root / "train/cat/1.PNG")
    put(root / "train/montage.png")
    put(root / "train/cat/noext")
    put(root / "train/cat/._0.png")
    put(root / "train/.ipynb_checkpoints/0.png")
    put(root / "train/dog/puppy/2.png")
    for name in ("metadata.csv", "cat/Thumbs.db", "cat/.DS_Store"):
        (root / "train" / name).write_bytes(b"file_name,label\ncat/0.png,5\n")
    os.mkfifo(root / "train/cat/pipe.png")
    assert listed(root)[0] == {
        "train/cat/0.png": 0, "train/cat/1.PNG": 0, "train/dog/0.png": 1, "train/dog/puppy/2.png": 1,
    }  # fmt: skip
    (message,) = caplog.messages
    for part in (
        "passed over 4 files that are no images (metadata.csv, cat/Thumbs.db, cat/noext and 1 more)",
        "passed over 1 image outside the classes (montage.png)",
        "passed over 1 hidden image (._0.png)",
        "images of folders within a class count as that class (dog/puppy)",
    ):
        assert part in message


def test_links_are_followed_once(tmp_path, caplog):
    root = images(tmp_path / "images")
    put(tmp_path / "elsewhere/9.png")
    (root / "train/bird").symlink_to(tmp_path / "elsewhere")
    (root / "train/cat/loop").symlink_to(root / "train/cat")
    (root / "train/cat/self.png").symlink_to("self.png")
    (root / "train/dog/gone.png").symlink_to("nowhere.png")
    assert listed(root)[0] == {
        "train/bird/9.png": 0, "train/cat/0.png": 1, "train/cat/self.png": 1,
        "train/dog/0.png": 2, "train/dog/gone.png": 2,
    }  # fmt: skip
    assert "1 second link to a folder (cat/loop)" in caplog.text


def test_names_that_are_not_utf8(tmp_path, caplog):
    root = images(tmp_path)
    for split in ("train", "validation"):
        put(root / split / os.fsdecode(b"caf\xe9") / os.fsdecode(b"0\xff.png"))
        (root / split / os.fsdecode(b"\xfe.txt")).write_text("")
    found = loaded(root)
    encoded, label, path = found.train.read(0)
    assert label == 0
    assert path == rf"{root}/train/caf\xe9/0\xff.png"
    assert sources._decode(encoded).size == (8, 8)
    assert caplog.text.isascii()


def test_validation_takes_the_numbers_of_the_training_classes(tmp_path, caplog):
    root = images(tmp_path, ("a", "b", "c"))
    (root / "validation/b/0.png").unlink()
    assert listed(root)[1] == {"validation/a/0.png": 0, "validation/c/0.png": 2}
    assert "validation has no image of the classes b" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: (r / "train/b/0.png").unlink(),
            r"train_split: no image in .*/train of the .* b$",
        ),
        (
            lambda r: put(r / "validation/d/0.png"),
            r"val_split: .* classes that .*/train has not: d",
        ),
        (lambda r: (r / "train").rename(r / "t"), r"no split 'train'; it has t, validation in "),
        (lambda r: (r / "validation").rename(r / "v"), r"no split 'validation'; it has train, v"),
    ],
)
def test_splits_that_training_does_not_survive(tmp_path, change, message):
    change(images(tmp_path, ("a", "b", "c")))
    with pytest.raises(ConfigError, match=message) as error:
        loaded(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("path", "more"), [("none", ""), ("~/none", "; ~ is taken as it stands")])
def test_a_path_that_is_no_folder(path, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        loaded(Path(path))
    assert str(error.value) == f"data.path: no such folder {path}{more}"


def test_layouts_without_two_classes(tmp_path):
    with pytest.raises(ConfigError, match=r"has one class folder, 'only', and training needs two"):
        loaded(images(tmp_path / "one", ("only",)))
    put(tmp_path / "flat/train/0.png")
    put(tmp_path / "flat/validation/0.png")
    with pytest.raises(ConfigError, match=r"flat/train has no class folders, but 1 images"):
        loaded(tmp_path / "flat")
    (tmp_path / "empty/train/a").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no image in the class folders of .*empty/train"):
        loaded(tmp_path / "empty")


def test_a_folder_by_itself(tmp_path):
    root = images(tmp_path, ("a", "b"))
    rows, names = folder.load_one(str(root / "train"), "--set-folder")
    assert (len(rows), names) == (2, ["a", "b"])
    with pytest.raises(ConfigError, match="--set-folder: no such folder nowhere"):
        folder.load_one("nowhere", "--set-folder")
