"""Backbones of dense models by timm's name.

A name is built once on the meta device to find out its kind: a network with maps of several strides,
or a plain ViT, whose only map becomes a pyramid. Of timm's options for images of any size, the first
that the network takes and that works is used.
"""

from __future__ import annotations

import difflib
import functools
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .plain_vit import plain_vit
from .sizes import WORKING, multiple_of, remember

# Each network of timm takes at most one of them.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {},
    {"strict_img_size": False},
    {"dynamic_img_size": True},
)
# Maps of 14 pixels do not halve and double to strides of 4 to 32.
_PATCH = 16
_ODD_PATCH = 14
PLAIN = 0


def timm_body(name: str, *, window: int = 14, global_blocks: int = 4, **options: Any) -> nn.Module:
    """A backbone for images of any size.

    Args:
        name: of a timm model, this package's included. A VisionTransformer becomes a `PlainViT`; a
            patch of 14 pixels (DINOv2) is resampled to 16 by timm.
        window, global_blocks: of a plain ViT; see `PlainViT`. Defaults 14 and 4.
        options: of `timm.create_model`, such as `pretrained` and `drop_path_rate`.
    Returns:
        A module that returns maps.
    Raises:
        ValueError: no such model, it has no maps, or it takes images of one size alone.
    """
    import timm

    _check_name(name)
    built = {k: v for k, v in options.items() if k != "pretrained"}
    multiple, more = _kind_of(name, tuple(sorted(built.items())))
    if multiple == PLAIN:
        options = {"num_classes": 0, **more, **options}
        return plain_vit(name, window=window, global_blocks=global_blocks, **options)
    body: nn.Module = timm.create_model(name, features_only=True, **more, **options)
    remember(body, multiple)
    return body


def is_plain(name: str) -> bool:
    """True if a timm name is of a VisionTransformer, which becomes a `PlainViT`.

    Raises:
        ValueError: see `timm_body`.
    """
    _check_name(name)
    return _kind_of(name, ())[0] == PLAIN


def _check_name(name: str) -> None:
    import timm

    import mesa_train.models  # noqa: F401  # registers this package's models

    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=4))
        hint = f"; close names: {near}" if near else ""
        raise ValueError(f"no model {name!r} in timm{hint}")


@functools.lru_cache(maxsize=64)
def _kind_of(name: str, options: tuple[tuple[str, Any], ...]) -> tuple[int, dict[str, Any]]:
    """The number of `multiple_of`, or PLAIN, and timm's options for images of any size."""
    if name.startswith("litv2"):
        return 1, {}
    first: Exception | None = None
    for more in _ANY_SIZE:
        try:
            with torch.device("meta"):
                body = _create(name, features_only=True, **more, **dict(options))
            if len(set(body.feature_info.reduction())) == 1:
                found = _plain_options(name, options)
                if found is not None:
                    return PLAIN, found
            multiple = multiple_of(body, name)
        except Exception as error:  # timm's models raise errors of many types
            # The first of an option that the model does not have says nothing about the model.
            first = first or error
        else:
            return multiple, more
    assert first is not None
    reason = " ".join(str(first).split())
    if not reason.startswith(name):
        reason = f"{name} cannot be built with maps: {reason[:160]}; {WORKING}"
    raise ValueError(reason) from None


def _plain_options(name: str, options: tuple[tuple[str, Any], ...]) -> dict[str, Any] | None:
    """Options with which a `PlainViT` is built; None if the model is no VisionTransformer."""
    with torch.device("meta"):
        vit = _create(name, num_classes=0, **dict(options))
        if not isinstance(vit, VisionTransformer):
            return None
        patch = vit.patch_embed.patch_size[0]
        more: dict[str, Any] = {"patch_size": _PATCH} if patch == _ODD_PATCH else {}
        # Raises for models that a PlainViT does not take.
        plain_vit(_create(name, num_classes=0, **more, **dict(options)), global_blocks=0)
    return more


def _create(name: str, **options: Any) -> Any:
    import timm

    return timm.create_model(name, **options)
