"""Digits at random places, sizes and angles of an empty canvas.

Why: in MNIST every digit fills the frame, so a comparison of pixels classifies it: nearest
neighbours of a network with random weights do so too. Of scattered digits they see the place first.
A network must learn that place, size and angle do not matter.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Side of the canvas, and smallest and largest side of a digit's picture, in pixels; degrees.
CANVAS, SIDES, TURN = 28, (14.0, 24.0), 20.0
# The ink's share of a picture's side.
_INK = 0.8


def scatter(images: Tensor, seed: int = 0) -> Tensor:
    """Place each image on a canvas of its own.

    The ink stays within the canvas. Image i depends on (seed, i) alone.

    Args:
        images: (N, 1, H, W) in uint8, dark around the ink.
        seed: default 0.
    Returns:
        (N, 1, CANVAS, CANVAS) in uint8.
    """
    count = len(images)
    drawn = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    side = SIDES[0] + (SIDES[1] - SIDES[0]) * drawn[:, 0]
    angle = (2 * drawn[:, 1] - 1) * math.radians(TURN)
    # Middles in the canvas's coordinates, -1 to 1.
    free = 1 - _INK * side / CANVAS
    x, y = ((2 * drawn[:, i] - 1) * free for i in (2, 3))
    cos, sin = (part * CANVAS / side for part in (angle.cos(), angle.sin()))
    theta = torch.stack(
        [
            torch.stack([cos, -sin, sin * y - cos * x], 1),
            torch.stack([sin, cos, -sin * x - cos * y], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [count, 1, CANVAS, CANVAS], align_corners=False)
    placed = F.grid_sample(images.float(), grid, align_corners=False)
    return placed.round().clamp(0, 255).to(torch.uint8)
