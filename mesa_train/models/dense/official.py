"""Official checkpoints of LITv2's dense models (mmdet 2.11, mmseg 0.13) for this package's models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# Pattern of an official key, and its replacement. The first match counts.
_NAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"backbone\.(.+)", r"backbone.body.\1"),
        (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
        (r"neck\.fpn_convs\.(\d+)\.conv\.(.+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
        (r"bbox_head\.cls_convs\.(\d+)\.conv\.(.+)", r"head.classification_head.conv.\1.0.\2"),
        (r"bbox_head\.retina_cls\.(.+)", r"head.classification_head.cls_logits.\1"),
        (r"bbox_head\.reg_convs\.(\d+)\.conv\.(.+)", r"head.regression_head.conv.\1.0.\2"),
        (r"bbox_head\.retina_reg\.(.+)", r"head.regression_head.bbox_reg.\1"),
        (r"rpn_head\.rpn_conv\.(.+)", r"rpn.head.conv.0.0.\1"),
        (r"rpn_head\.rpn_cls\.(.+)", r"rpn.head.cls_logits.\1"),
        (r"rpn_head\.rpn_reg\.(.+)", r"rpn.head.bbox_pred.\1"),
        (r"roi_head\.bbox_head\.shared_fcs\.0\.(.+)", r"roi_heads.box_head.fc6.\1"),
        (r"roi_head\.bbox_head\.shared_fcs\.1\.(.+)", r"roi_heads.box_head.fc7.\1"),
        (r"roi_head\.bbox_head\.fc_cls\.(.+)", r"roi_heads.box_predictor.cls_score.\1"),
        (r"roi_head\.bbox_head\.fc_reg\.(.+)", r"roi_heads.box_predictor.bbox_pred.\1"),
        (r"roi_head\.mask_head\.convs\.(\d+)\.conv\.(.+)", r"roi_heads.mask_head.\1.0.\2"),
        (r"roi_head\.mask_head\.upsample\.(.+)", r"roi_heads.mask_predictor.conv5_mask.\1"),
        (r"roi_head\.mask_head\.conv_logits\.(.+)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
        (r"(decode_head\..+)", r"\1"),
    )
]
_EXTRA = re.compile(r"backbone\.fpn\.layer_blocks\.(\d+)\.0\.(.+)")


def from_official(
    state: Mapping[str, Any] | Iterable[Any], *, background: str = "last"
) -> dict[str, Any]:
    """Rename the weights of an official dense model.

    Args:
        state: official state dict of a RetinaNet, Mask R-CNN, Faster R-CNN or Semantic FPN, or a list
            of (key, value) pairs, or a dictionary with either as "state_dict" or "keys". Keys may
            begin with "module.". With `background="last"` the values may be anything, such as shapes.
        background: "last" (default), or "first" for a model of that convention: the background's
            class row moves to the front, and zeros become its deltas and its mask.
    Returns:
        A state dict for `load_state_dict`.
    Raises:
        ValueError: a key is of another model or occurs twice, or background is unknown.
        TypeError: state is neither a dictionary nor a list of pairs.
    """
    if background not in ("last", "first"):
        raise ValueError(f"background must be 'last' or 'first', got {background!r}")
    state = _weights(state)
    laterals = len({key.split(".")[2] for key in state if key.startswith("neck.lateral_convs.")})
    converted = {}
    for key, value in state.items():
        if background == "first" and not isinstance(value, Tensor):
            raise ValueError(
                f"background='first' needs tensors, got {type(value).__name__} for {key}"
            )
        name = _renamed(key, laterals)
        converted[name] = _background_first(name, value) if background == "first" else value
    return converted


def _weights(state: Any) -> dict[str, Any]:
    """Values by key, without a wrapper's entry or prefix."""
    while isinstance(state, Mapping) and (entry := _entry(state)) is not None:
        state = entry
    if not isinstance(state, Mapping):
        try:
            pairs = [(key, value) for key, value in state]
        except (TypeError, ValueError):
            raise TypeError(
                "state must be a state dict or a list of (key, value) pairs, got "
                f"{type(state).__name__}"
            ) from None
    else:
        pairs = list(state.items())
    found: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise TypeError(f"state must have texts as keys, got {key!r}")
        name = key.removeprefix("module.")
        if name in found:
            raise ValueError(f"state has {name!r} twice")
        found[name] = value
    return found


def _entry(state: Mapping[Any, Any]) -> Any:
    """The weights in a checkpoint's entry; None if the dictionary is itself of weights."""
    for name in ("state_dict", "keys"):
        if isinstance(state.get(name), Mapping | list):
            return state[name]
    return None


def _renamed(key: str, laterals: int) -> str:
    for pattern, replacement in _NAMES:
        match = pattern.fullmatch(key)
        if match:
            name = match.expand(replacement)
            extra = _EXTRA.fullmatch(name)
            if extra and int(extra[1]) >= laterals:
                return f"backbone.fpn.extra_blocks.p{int(extra[1]) - laterals + 6}.{extra[2]}"
            return name
    raise ValueError(f"{key!r} is no key of an official RetinaNet, R-CNN or Semantic FPN")


def _background_first(name: str, value: Tensor) -> Tensor:
    """Move or add the background's rows of a predictor."""
    if ".cls_score." in name:
        return torch.cat([value[-1:], value[:-1]])
    rows = {"bbox_pred": 4, "mask_fcn_logits": 1}.get(name.split(".")[-2], 0)
    if not name.startswith("roi_heads.") or not rows:
        return value
    return torch.cat([torch.zeros_like(value[:rows]), value])
