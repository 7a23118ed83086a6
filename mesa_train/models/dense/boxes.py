"""Anchors, box coder and matcher of torchvision's detectors, with the reference's rules as options.

All three compute in float32 at least. torchvision's anchors take the dtype of the feature maps, and
under autocast float16 cannot hold coordinates above 2048 pixels to the pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import _utils as detection
from torchvision.models.detection.anchor_utils import AnchorGenerator


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Anchors(AnchorGenerator):
    """Anchors (H * W * A, 4) of each level as (x1, y1, x2, y2) in pixels, at (stride * j, stride * i).

    Args:
        sizes: sides in pixels, per level.
        ratios: height over width; all levels have the same ratios.
        strides: pixels between anchors, per level; None takes image size // map size.
        rounded: round corners to integers; default false.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        strides: Sequence[int] | None = None,
        *,
        rounded: bool = False,
    ) -> None:
        self.rounded = rounded
        super().__init__(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
        self.strides = strides

    def generate_anchors(
        self,
        scales: Any,
        aspect_ratios: Any,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
    ) -> Tensor:
        """Anchors (len(aspect_ratios) * len(scales), 4) around (0, 0)."""
        if self.rounded:
            return super().generate_anchors(scales, aspect_ratios, dtype, device)
        sides = torch.tensor(scales, dtype=dtype, device=device)
        roots = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths = ((1 / roots)[:, None] * sides).flatten()
        heights = (roots[:, None] * sides).flatten()
        return torch.stack([-widths, -heights, widths, heights], 1) / 2

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of all levels (A, 4), for each image."""
        grids = [tuple(x.shape[-2:]) for x in feature_maps]
        first = feature_maps[0]
        self.set_cell_anchors(torch.promote_types(first.dtype, torch.float32), first.device)
        if self.strides is None:
            height, width = image_list.tensors.shape[-2:]
            strides = [(height // rows, width // columns) for rows, columns in grids]
        else:
            strides = [(stride, stride) for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors for _ in image_list.image_sizes]


class BoxCoder(detection.BoxCoder):
    """torchvision's coder in float32 at least.

    Args:
        weights: of (x, y, width, height).
        clamp_small: clamp decoded log sizes from below too, at -log(1000 / 16); default true.
    """

    def __init__(
        self, weights: tuple[float, float, float, float], *, clamp_small: bool = True
    ) -> None:
        super().__init__(weights)
        self.clamp_small = clamp_small

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Boxes (N, 4 * classes) of deltas (N, 4 * classes) and boxes (N, 4)."""
        rel_codes = widened(rel_codes)
        if self.clamp_small:
            free = float("-inf")
            sizes = [-self.bbox_xform_clip * weight for weight in self.weights[2:]]
            limits = rel_codes.new_tensor([free, free, *sizes])
            shape = rel_codes.shape
            rel_codes = rel_codes.unflatten(-1, (-1, 4)).maximum(limits).reshape(shape)
        return super().decode_single(rel_codes, boxes)


class Matcher(detection.Matcher):
    """Index of the matched box for each anchor: -1 below `low`, -2 between `low` and `high`.

    The result has a fixed shape and no step reads values, so that it runs on fake tensors.

    Args:
        high: positive from this IoU on.
        low: negative below this IoU.
        low_quality_iou: an anchor with the highest IoU of a box is positive if that IoU is at least
            this value; None: never.
        to: a low-quality match goes to that "box" (of several, the last), or to the "best" box of
            the anchor.
    """

    def __init__(
        self, high: float, low: float, low_quality_iou: float | None = 0.0, to: str = "box"
    ) -> None:
        super().__init__(high, low, allow_low_quality_matches=low_quality_iou is not None)
        self.low_quality_iou = low_quality_iou
        self.to = to

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        """Match IoUs (boxes, anchors) to indices (anchors,) of int64."""
        ious = match_quality_matrix
        if ious.shape[0] == 0:
            return ious.new_full(ious.shape[1:], self.BELOW_LOW_THRESHOLD, dtype=torch.int64)
        if ious.shape[1] == 0:
            return ious.new_empty(0, dtype=torch.int64)
        values, best = ious.max(0)
        matches = best.masked_fill(values < self.high_threshold, self.BETWEEN_THRESHOLDS)
        matches = matches.masked_fill(values < self.low_threshold, self.BELOW_LOW_THRESHOLD)
        if self.low_quality_iou is None:
            return matches
        highest = ious.amax(1, keepdim=True)
        pairs = (ious == highest) & (highest >= self.low_quality_iou)
        if self.to == "best":
            return torch.where(pairs.any(0), best, matches)
        numbers = torch.arange(1, len(ious) + 1, device=ious.device)[:, None]
        last = (pairs * numbers).amax(0)
        return torch.where(last > 0, last - 1, matches)
