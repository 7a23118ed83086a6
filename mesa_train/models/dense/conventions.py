"""The points in which the reference detectors and torchvision's differ, as options.

The reference is the detectors of LITv2's authors (github.com/ziplab/LITv2 on mmdet 2.11). Its
behaviour is the default of every option. `Conventions.torchvision()` has torchvision's values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

# The values of torchvision 0.29 that differ from the reference's.
_TORCHVISION: dict[str, Any] = {
    "p7_relu": True,
    "anchor_strides": "image",
    "round_anchors": True,
    "retinanet_loss": "image",
    "retinanet_candidates": "pairs",
    "retinanet_detections": 300,
    "clamp_small_sizes": False,
    "low_quality_to": "best",
    "rpn_low_quality_iou": 0.0,
    "roi_low_quality": False,
    "smooth_l1_beta": 1 / 9,
    "rpn_train_proposals": 2000,
    "roi_aligned": False,
    "roi_sampling_ratio": 2,
    "mask_target_threshold": None,
    "mask_threshold": None,
    "background": "first",
    "drop_tiny_boxes": True,
    "resized_sides": "floor",
    "init": "torchvision",
}
_CHOICES = {
    "anchor_strides": ("fixed", "image"),
    "retinanet_loss": ("batch", "image"),
    "retinanet_candidates": ("anchors", "pairs"),
    "low_quality_to": ("box", "best"),
    "background": ("last", "first"),
    "resized_sides": ("round", "floor"),
    "init": ("reference", "torchvision"),
}


@dataclasses.dataclass(frozen=True)
class Conventions:
    """How a detector computes where the reference and torchvision differ. A frozen value.

    Args:
        p7_relu: a ReLU between P6 and P7; default false.
        anchor_strides: "fixed" (default) places anchors at the levels' strides (4, 8, ...). "image"
            uses image size // map size, which is not the stride on odd maps.
        round_anchors: round corners of anchors, and RetinaNet's sizes, to integers; default false.
        retinanet_loss: "batch" (default) divides the sums by the positives of the batch, each image
            counted as at least 1. "image" divides per image and takes the mean.
        retinanet_candidates: what RetinaNet keeps per level before NMS: the best 1000 "anchors"
            (default) by their best class, or the best 1000 "pairs" of anchor and class.
        retinanet_detections: detections per image of RetinaNet; default 100.
        clamp_small_sizes: clamp decoded log sizes from below too, at -log(1000 / 16); default true.
        low_quality_to: an anchor with a box's highest IoU goes to that "box" (default; of several,
            the last), or to the "best" box of the anchor.
        rpn_low_quality_iou: smallest IoU of the RPN's matches below 0.7; default 0.3. With 0, a box
            that overlaps no anchor makes all anchors positive.
        roi_low_quality: the RoI matcher reassigns positives as the RPN's; default true.
        smooth_l1_beta: beta of the RPN's and the RoI head's box loss; default 0, the L1 loss.
        rpn_train_proposals: proposals per image in training; default 1000.
        roi_aligned: RoIAlign shifts by half a pixel; default true.
        roi_sampling_ratio: samples per bin and axis of RoIAlign; default 0, which adapts to the box.
        mask_target_threshold: mask targets are 1 from this value on, else 0; None keeps fractions.
            Default 0.5.
        mask_threshold: predicted masks are boolean, true from this probability on; None returns
            probabilities. Default 0.5.
        background: index of the RoI head's background: "last" (default; labels from 0; no box deltas
            and no mask for it) or "first" (labels from 1).
        drop_tiny_boxes: drop proposals below 1e-3 and detections below 1e-2 pixels; default false.
        resized_sides: image sides after scaling, "round" (default) or "floor".
        init: initial weights of necks and heads, "reference" (default) or "torchvision".
    Raises:
        ValueError: a value is not one of the choices.
    """

    p7_relu: bool = False
    anchor_strides: str = "fixed"
    round_anchors: bool = False
    retinanet_loss: str = "batch"
    retinanet_candidates: str = "anchors"
    retinanet_detections: int = 100
    clamp_small_sizes: bool = True
    low_quality_to: str = "box"
    rpn_low_quality_iou: float = 0.3
    roi_low_quality: bool = True
    smooth_l1_beta: float = 0.0
    rpn_train_proposals: int = 1000
    roi_aligned: bool = True
    roi_sampling_ratio: int = 0
    mask_target_threshold: float | None = 0.5
    mask_threshold: float | None = 0.5
    background: str = "last"
    drop_tiny_boxes: bool = False
    resized_sides: str = "round"
    init: str = "reference"

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}")

    @classmethod
    def torchvision(cls, **changes: Any) -> Conventions:
        """torchvision's values, with `changes`."""
        return cls(**_TORCHVISION | changes)


def conventions_of(value: Conventions | str) -> Conventions:
    """The Conventions of a name, "reference" or "torchvision". ValueError for another name."""
    if isinstance(value, Conventions):
        return value
    if value == "reference":
        return Conventions()
    if value == "torchvision":
        return Conventions.torchvision()
    raise ValueError(
        f"conventions must be 'reference', 'torchvision' or a Conventions, got {value!r}"
    )
