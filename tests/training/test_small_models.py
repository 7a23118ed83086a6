"""Models for small images: the seed decides the weights, and a refusal is one clear line."""

import pytest
import torch

from mesa_train.training import small_models as models
from mesa_train.training.data.packaged import load


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_one_seed_is_one_model(digits):
    first, _ = models.build(models.SMALL_VIT, digits, seed=1)
    torch.manual_seed(5)
    again, _ = models.build(models.SMALL_VIT, digits, seed=1)
    other, _ = models.build(models.SMALL_VIT, digits, seed=2)
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("name", "image_size", "expected"),
    [
        (models.SMALL_VIT, None, 8),
        (models.SMALL_VIT, 27, 27),
        ("test_vit", None, models.DEFAULT_IMAGE_SIZE),
        ("test_resnet", 32, 32),
        ("litv2_tiny", None, 32),
    ],
)
def test_images_are_resized_to_suit_the_model(digits, name, image_size, expected):
    model, data = models.build(name, digits, seed=0, image_size=image_size)
    assert data.image_size == expected
    images = data.normalise(data.held_out.images[:2].float() / 255)
    assert model(images).shape == (2, 10)


def test_unknown_name_lists_close_ones(digits):
    with pytest.raises(ValueError, match=r"'vit_tinny_patch16_224'; close names: vit_tiny_patch16"):
        models.build("vit_tinny_patch16_224", digits, seed=0)


def test_refused_size_is_named(digits):
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 cannot take images of 5x5: "):
        models.build("vit_tiny_patch16_224", digits, seed=0, image_size=5)
