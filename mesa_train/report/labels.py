"""Labels of points that overlap neither each other nor the points: for charts with many names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

Box = tuple[float, float, float, float]


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    gap: float = 6.0,
    lines: Sequence[tuple[float, float]] = (),
) -> list[tuple[float, float]]:
    """The lower left corner of every label, in the units of the points (pixels, say).

    points: where the labelled points are. sizes: (width, height) of their labels. bounds: (left,
    bottom, right, top) that labels should stay in. gap: between a point and its label. lines: the
    corners of a line that labels had better not lie on.

    Crowded points go first; each takes the first place, on rings around it, that is free. If none
    is, the one that overlaps least.
    """
    half = 0.85 * gap
    dots = [(x - half, y - half, x + half, y + half) for x, y in points]
    path = [(x - 2, y - 2, x + 2, y + 2) for x, y in _along(lines, 4.0)]
    placed: list[Box] = []
    corners: dict[int, tuple[float, float]] = {}
    crowd = [sum(math.dist(p, q) < 12 * gap for q in points) for p in points]
    for index in sorted(range(len(points)), key=lambda i: -crowd[i]):
        (x, y), (width, height) = points[index], sizes[index]
        best, least = (x + gap, y - height / 2), math.inf
        for ring, angle in itertools.product(range(9), range(16)):
            turn = 2 * math.pi * angle / 16
            far = gap + ring * 0.9 * height
            cx, cy = x + far * math.cos(turn), y + far * math.sin(turn)
            # The label's nearest edge touches the ring.
            left = cx - width / 2 + math.cos(turn) * width / 2
            low = cy - height / 2 + math.sin(turn) * height / 2
            box = (left, low, left + width, low + height)
            cost = sum(_overlap(box, other) for other in placed)
            cost += sum(_overlap(box, dot) for dot in dots) + 4 * _outside(box, bounds)
            cost += 0.5 * sum(_overlap(box, dot) for dot in path)
            cost += 0.02 * ring * height
            if cost < least:
                best, least = (left, low), cost
        corners[index] = best
        placed.append((*best, best[0] + width, best[1] + height))
    return [corners[index] for index in range(len(points))]


def _along(corners: Sequence[tuple[float, float]], step: float) -> Iterator[tuple[float, float]]:
    """Points on a line through `corners`, at most `step` apart."""
    for (x, y), (u, v) in itertools.pairwise(corners):
        count = max(1, math.ceil(math.dist((x, y), (u, v)) / step))
        for i in range(count + 1):
            yield x + (u - x) * i / count, y + (v - y) * i / count


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Box, bounds: Box) -> float:
    own = (box[2] - box[0]) * (box[3] - box[1])
    return own - _overlap(box, bounds)
