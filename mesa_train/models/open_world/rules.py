"""The points in which the ORE paper, its published code and a correct detector differ, as options.

ORE is the open-world detector of Joseph, Khan, Khan and Balasubramanian (CVPR 2021,
arXiv 2103.02603), with code at github.com/JosephKJ/OWOD. `OpenWorldRules.paper()` has the paper's
values and `OpenWorldRules.official_code()` those of the code, including its mistakes. The default
has the paper's clustering and none of the mistakes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

# Exponent of the Minkowski distance, and the margin that belongs to it.
DISTANCES = {"euclidean": (2.0, 10.0), "minkowski10": (10.0, 2.0)}
_CHOICES = {
    "distance": tuple(DISTANCES),
    "unknown_boxes": ("proposal", "none", "nearest"),
    "feature_scale": ("none", "sqrt_dim"),
}


@dataclasses.dataclass(frozen=True)
class OpenWorldRules:
    """How an open-world detector labels unknowns and clusters features. A frozen value.

    Args:
        distance: of features and prototypes: "euclidean" (default; the paper) or "minkowski10" (the
            official code, which exchanged exponent and margin).
        margin: of the hinge; None (default) takes the distance's: 10 for "euclidean", 2 for
            "minkowski10".
        feature_scale: "none" (default) clusters the box head's features. "sqrt_dim" multiplies them
            by sqrt(dim) / (their norm + 1e-6): the margin then has one meaning for all backbones.
        cluster_weight: factor of the clustering loss; default 0.1. 0 turns it off.
        queue_size: newest features kept per class; default 20. The paper has 10.
        start: training steps before the first prototypes; default 1000.
        update_every: steps between updates of the prototypes; default 3000.
        momentum: of the prototypes in an update; default 0.99; in [0, 1].
        late_prototypes: a class that first appears after `start` takes the mean of its queue then.
            Default true. False is the paper's and the code's: such a class has the zero vector.
        unknowns_per_image: background proposals that become unknown, per image; default 1. 0: none.
        relabel_foreground: compare logits with -1 as the official code does. It then labels true
            objects as unknown if all background logits are below -1. Default false.
        unknown_boxes: box target of a pseudo-unknown: its own "proposal" (default), "none", or the
            "nearest" known box (the official code).
        mask_unseen: hide the logits of classes that are not learnt yet in evaluation, too. Default
            true. The official code hides them in training alone.
    Raises:
        ValueError: names the field, the value and the choices.
    """

    distance: str = "euclidean"
    margin: float | None = None
    feature_scale: str = "none"
    cluster_weight: float = 0.1
    queue_size: int = 20
    start: int = 1000
    update_every: int = 3000
    momentum: float = 0.99
    late_prototypes: bool = True
    unknowns_per_image: int = 1
    relabel_foreground: bool = False
    unknown_boxes: str = "proposal"
    mask_unseen: bool = True

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}")
        for field in ("queue_size", "update_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("cluster_weight", "start", "unknowns_per_image"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {self.momentum}")
        if self.margin is not None and not self.margin > 0:
            raise ValueError(f"margin must be positive, got {self.margin}")

    @property
    def hinge(self) -> float:
        """The margin: the given one, or the distance's."""
        return DISTANCES[self.distance][1] if self.margin is None else self.margin

    @classmethod
    def paper(cls, **changes: Any) -> OpenWorldRules:
        """The paper's values: Euclidean distance, margin 10, queues of 10, with `changes`."""
        values: dict[str, Any] = {"queue_size": 10, "late_prototypes": False}
        return cls(**values | changes)

    @classmethod
    def official_code(cls, **changes: Any) -> OpenWorldRules:
        """The published code's values and mistakes, with `changes`."""
        values: dict[str, Any] = {
            "distance": "minkowski10",
            "late_prototypes": False,
            "relabel_foreground": True,
            "unknown_boxes": "nearest",
            "mask_unseen": False,
        }
        return cls(**values | changes)


PRESETS: dict[str, Callable[..., OpenWorldRules]] = {
    "default": OpenWorldRules,
    "paper": OpenWorldRules.paper,
    "official_code": OpenWorldRules.official_code,
}


def rules_of(value: OpenWorldRules | str) -> OpenWorldRules:
    """The rules of a preset's name. ValueError for an unknown name."""
    if isinstance(value, OpenWorldRules):
        return value
    if value not in PRESETS:
        raise ValueError(
            f"rules must be one of {', '.join(PRESETS)} or an OpenWorldRules, got {value!r}"
        )
    return PRESETS[value]()
