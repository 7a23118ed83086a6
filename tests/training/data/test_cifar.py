"""CIFAR-10 from pickles and from sheets: small files in the real layouts."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mesa_train.training.data import cifar
from mesa_train.training.data.packaged import light_augmentation, load

NAMES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return {name: generator.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8) for name in NAMES}


def labels_of(number):
    return [(number + k) % 10 for k in range(4)]


def write_pickles(folder, images):
    folder.mkdir()
    for number, name in enumerate(NAMES):
        content = {"data": images[name].reshape(4, -1), "labels": labels_of(number)}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_sheets(folder, images):
    folder.mkdir()
    for name in NAMES:
        rows = images[name].transpose(0, 2, 3, 1).reshape(4, 1024, 3)
        Image.fromarray(rows).save(folder / f"{name}.png")
    train = [label for number in range(5) for label in labels_of(number)]
    (folder / "train_lables.json").write_text(json.dumps(train))
    (folder / "test_lables.json").write_text(json.dumps(labels_of(5)))


@pytest.mark.parametrize(
    ("write", "folder"),
    [(write_pickles, "cifar-10-batches-py"), (write_sheets, "package"), (write_sheets, "sheets")],
)
def test_both_layouts_give_the_same_images(tmp_path, images, write, folder):
    write(tmp_path / folder, images)
    root = tmp_path / folder if folder == "sheets" else tmp_path
    train, train_labels, test, test_labels = cifar.read(root)
    assert torch.equal(train[4:8], torch.from_numpy(images["data_batch_2"]))
    assert torch.equal(test, torch.from_numpy(images["test_batch"]))
    assert train_labels[4:8].tolist() == labels_of(1)
    assert test_labels.tolist() == labels_of(5)


def test_load_has_the_official_split(tmp_path, images):
    write_sheets(tmp_path / "package", images)
    found = load(f"cifar10:{tmp_path}")
    assert (len(found.train), len(found.held_out), found.channels) == (20, 4, 3)
    photo = found.train.images[0].float()
    changed = [light_augmentation(found)(photo) for _ in range(8)]
    assert all(other.shape == photo.shape for other in changed)
    assert not all(torch.equal(other, photo) for other in changed)


def test_what_is_not_cifar_is_refused(tmp_path, images):
    with pytest.raises(ValueError, match=r"has no CIFAR-10: expected data_batch_1 to"):
        load(f"cifar10:{tmp_path}")
    with pytest.raises(ValueError, match=r"'cifar'; choose one of .*cifar10:DIRECTORY"):
        load("cifar")
    write_sheets(tmp_path / "package", images)
    (tmp_path / "package/test_lables.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"test_lables.json must have 4 labels, got 1"):
        cifar.read(tmp_path)


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_cannot_run_code(tmp_path, images, capsys):
    write_pickles(tmp_path / "batches", images)
    (tmp_path / "batches/data_batch_1").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"no object of builtins\.print"):
        cifar.read(tmp_path / "batches")
    assert "executed" not in capsys.readouterr().out
