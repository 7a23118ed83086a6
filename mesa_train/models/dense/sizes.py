"""Which images a backbone takes, found by a forward on tensors without values.

Dense models see images of many sizes. Some backbones take one size alone, others need sides that are
multiples of their patches. A forward on fake tensors shows it when the model is built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

# Multiples of 32 whose maps of stride 32 fit no usual window; then any sides.
_PADDED, _ODD = (320, 416), (331, 410)
_MULTIPLE = 32
_UNKNOWN = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)
# Set by `lit.pyramid` too.
_MARK = "takes_multiples_of"
WORKING = "litv2_*, lit_*, resnet*, convnext*, swin_*, pvt_v2_* and plain ViTs (vit_*, deit*) work"


def maps_of(output: Any) -> list[Tensor]:
    """The maps of a backbone's output, a list or an output with `feature_maps`."""
    return list(getattr(output, "feature_maps", output))


def multiple_of(model: nn.Module, name: str = "") -> int:
    """The number that the sides of an image must be multiples of: 1 or 32.

    The model is run on fake tensors, without values, so it computes and allocates nothing. A model
    with operators that fake tensors do not know counts as one that takes all images. The result is
    remembered as an attribute of the model.

    Args:
        model: a backbone.
        name: for messages; default: the class.
    Raises:
        ValueError: the model does not take images of several sizes.
    """
    known = getattr(model, _MARK, None)
    if known is None:
        known = _multiple_of(model, name or type(model).__name__)
        remember(model, known)
    return int(known)


def remember(model: nn.Module, multiple: int) -> None:
    """Store the result of `multiple_of` in a model that was built alike."""
    setattr(model, _MARK, multiple)


def _multiple_of(model: nn.Module, name: str) -> int:
    with contextlib.suppress(Exception):
        shapes(model, _ODD)
        return 1
    try:
        shapes(model, _PADDED)
    except _UNKNOWN:
        return 1
    except Exception as error:  # models raise errors of many types
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        height, width = _PADDED
        raise ValueError(
            f"{name} does not take images of {height}x{width}, and dense models have images of many "
            f"sizes: {reason}; {WORKING}"
        ) from None
    return _MULTIPLE


def shapes(model: nn.Module, size: tuple[int, int]) -> list[tuple[int, ...]]:
    """The shapes of a backbone's maps of an image, without computing them.

    Raises:
        Exception: any that the model raises.
    """
    parameter = next(model.parameters())
    fake: Any = (
        contextlib.nullcontext()
        if parameter.device.type == "meta"
        else fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    )
    with torch.no_grad(), evaluating(model), fake:
        images = torch.empty(1, 3, *size, device=parameter.device, dtype=parameter.dtype)
        return [tuple(x.shape) for x in maps_of(model(images))]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
