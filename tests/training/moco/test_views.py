"""The two augmentation pipelines: their order, their probabilities, what differs between them."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from mesa_train.training.data.config import DataConfig
from mesa_train.training.moco.config import ViewsConfig
from mesa_train.training.moco.views import MEAN, STD, Blur, TwoViews, pipeline, transforms

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))


def kinds(compose):
    return [type(t).__name__ for t in compose.transforms]


def test_the_order_and_the_probabilities():
    views, plain = transforms(DataConfig(image_size=32), ViewsConfig())
    order = ["RandomResizedCrop", "RandomApply", "RandomGrayscale", "Blur", "RandomSolarize",
             "RandomHorizontalFlip", "ToImage", "ToDtype", "Normalize"]  # fmt: skip
    for one, blur, solarise in zip(views.pipelines, (1.0, 0.1), (0.0, 0.2), strict=True):
        assert kinds(one) == order
        crop, jitter, grey, blurred, solarised, flip, *_, normalise = one.transforms
        assert tuple(crop.scale) == (0.08, 1.0)
        assert tuple(crop.ratio) == (3 / 4, 4 / 3)
        assert crop.interpolation is v2.InterpolationMode.BILINEAR
        assert (jitter.p, grey.p, flip.p) == (0.8, 0.2, 0.5)
        (colours,) = jitter.transforms
        assert [tuple(colours.brightness), tuple(colours.contrast)] == [(0.6, 1.4)] * 2
        assert tuple(colours.saturation) == (0.8, 1.2)
        assert tuple(colours.hue) == (-0.1, 0.1)
        assert (blurred.probability, blurred.largest) == (blur, 2.0)
        assert (solarised.p, solarised.threshold) == (solarise, 128)
        assert (tuple(normalise.mean), tuple(normalise.std)) == (MEAN, STD)
    assert kinds(plain)[:2] == ["Resize", "CenterCrop"]
    assert plain(PICTURE).shape == (3, 32, 32)


def test_views_are_two_and_random():
    views, _ = transforms(DataConfig(image_size=32), ViewsConfig())
    torch.manual_seed(1)
    one, two = views(PICTURE), views(PICTURE)
    assert one.shape == (2, 3, 32, 32)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, two)
    torch.manual_seed(1)
    assert torch.equal(views(PICTURE), one)


def test_the_first_pipeline_comes_first():
    def fixed(value):
        return lambda image: torch.full((3, 1, 1), float(value))

    assert TwoViews(fixed(1), fixed(2))(PICTURE)[:, 0, 0, 0].tolist() == [1, 2]


def test_the_blur_is_pillows_with_a_radius_from_a_tenth():
    torch.manual_seed(0)
    draw = torch.get_rng_state()
    found = Blur(1.0)(PICTURE)
    torch.set_rng_state(draw)
    torch.rand(())
    radius = torch.empty(()).uniform_(0.1, 2.0).item()
    assert np.array_equal(found, PICTURE.filter(ImageFilter.GaussianBlur(radius)))
    assert Blur(0.0)(PICTURE) is PICTURE


def test_solarisation_inverts_the_bright_pixels():
    grey = Image.fromarray(np.tile(np.array([[[100], [200]]], np.uint8), (1, 1, 3)))
    config = ViewsConfig(crop_min=1.0, hflip=0.0)
    solarise = pipeline(2, config, blur=0.0, solarise=1.0).transforms[4]
    assert np.asarray(solarise(grey))[0, :, 0].tolist() == [100, 55]


def test_no_crop_squashes_the_whole_image():
    wide = Image.fromarray(
        np.repeat(np.arange(80, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2)
    )
    _, whole = transforms(DataConfig(image_size=16, crop=False), ViewsConfig())
    _, cut = transforms(DataConfig(image_size=16), ViewsConfig())
    spread = [(x[0, 0, -1] - x[0, 0, 0]).item() for x in (whole(wide), cut(wide))]
    assert spread[1] / spread[0] == pytest.approx(16 / 36, abs=0.05)
