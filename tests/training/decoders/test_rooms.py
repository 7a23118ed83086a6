"""Rooms with exact depth: floor, wall and digits obey perspective, and the splits share nothing."""

import numpy as np
import pytest
import torch

from mesa_train.training.decoders import rooms
from mesa_train.training.decoders.rooms import CAMERA, FOCAL, SIDE, TALL, Rooms
from mesa_train.training.decoders.run import BANDS, bands_of


@pytest.fixture(scope="module")
def known():
    return Rooms(held_out=False)


@pytest.fixture(scope="module")
def held_out():
    return Rooms(held_out=True)


def test_floor_and_wall_lie_on_planes(known):
    random = np.random.default_rng(0)
    _, depth = known._empty(random, horizon=40.0, wall=6.0)
    assert (depth[:70] == 6.0).all()  # 1.6 x 112 / 6 = 29.9 rows below the horizon
    rows = np.arange(70, SIDE)
    assert depth[70:, 0] == pytest.approx(FOCAL * CAMERA / (rows - 40.0), rel=1e-6)
    assert (depth == depth[:, :1]).all()


@pytest.mark.parametrize("distance", [2.5, 4.0, 8.0])
def test_a_digit_is_as_tall_as_its_distance_says_and_stands_on_the_floor(known, distance):
    ink = rooms._scaled(known.digits[0], distance)
    assert ink.shape[0] == pytest.approx(FOCAL * TALL / distance, abs=0.5)
    pixels, depth = np.zeros((SIDE, SIDE, 3), np.float32), np.full((SIDE, SIDE), 9, np.float32)
    rooms._stand(np.random.default_rng(0), pixels, depth, ink, 30.0, distance)
    there = np.argwhere(depth == np.float32(distance))
    assert len(there) > 10
    # The floor at this distance is CAMERA below the horizon.
    assert there[:, 0].max() + 1 == pytest.approx(30 + FOCAL * CAMERA / distance, abs=2)
    assert set(np.unique(depth)) == {np.float32(distance), np.float32(9)}


def test_a_room_depends_on_its_number_and_split_alone(known, held_out):
    image, depth = known.read(3)
    assert (image.shape, image.dtype) == ((3, SIDE, SIDE), torch.uint8)
    assert torch.equal(image, known.read(3)[0])
    assert not torch.equal(image, known.read(4)[0])
    assert not torch.equal(depth, held_out.read(3)[1])
    assert 1.5 < depth.min() < depth.max() < 9.0
    wide = [p.shape[1] for p in (known.photographs[0], held_out.photographs[0])]
    assert sum(wide) == 640
    digits = {d.tobytes() for d in known.digits}
    assert not digits & {d.tobytes() for d in held_out.digits}


def test_the_place_of_a_pixel_does_not_tell_its_depth(known, held_out):
    """The median training depth of each pixel errs by more than a tenth on other rooms."""
    there = torch.stack([known.read(i)[1] for i in range(64)]).median(0).values
    errors = [((there - d).abs() / d).mean() for d in (held_out.read(i)[1] for i in range(16))]
    assert torch.stack(errors).mean() > 0.1


def test_bands_are_equal_parts_of_the_height_of_valid_pixels():
    depth = torch.ones(2 * BANDS, 3)
    depth[5] = 0
    found = bands_of(depth)
    assert len(found) == 3 * (2 * BANDS - 1)
    assert found.bincount().tolist() == [6, 6, 3] + [6] * (BANDS - 3)
    assert bands_of(torch.ones(1, 2)).tolist() == [0, 0]
