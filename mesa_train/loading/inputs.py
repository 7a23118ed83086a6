"""Make inputs of another batch size, from existing inputs or by a function of the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NO_BATCH = (
    "other batch sizes cannot be computed, because an input has no batch dimension; let the factory "
    "return a function of the batch size"
)


def resized(
    inputs: Any,
    current_batch: int,
    batch: int,
    with_data: bool,
    make: Callable[[int], Any] | None = None,
) -> Any:
    """Make inputs of `batch` images.

    Args:
        inputs: inputs of `current_batch` images.
        current_batch: number of images of `inputs`.
        batch: number of images of the result.
        with_data: False returns tensors on the meta device.
        make: function of the batch size that makes the inputs; None repeats and cuts `inputs` along
            the first dimension.

    Returns:
        The inputs; None if a tensor has no such dimension.
    """
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    if make is not None and tensors:
        return _call(make, batch, tensors[0].device if with_data else torch.device("meta"))
    if not tensors or any(t.dim() == 0 or t.shape[0] != current_batch for t in tensors):
        return None

    def resize(tensor: Tensor) -> Tensor:
        if not with_data:
            return tensor.new_empty(batch, *tensor.shape[1:], device="meta")
        times = -(-batch // current_batch)
        return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch].clone()

    return pytree.tree_map_only(Tensor, resize, inputs)


def _call(make: Callable[[int], Any], batch: int, device: torch.device) -> Any:
    """Call the function of the batch size; on the CPU if it needs values and `device` is meta."""
    with torch.random.fork_rng(devices=[]):
        try:
            with device:
                inputs = make(batch)
        except (NotImplementedError, RuntimeError):
            if device.type != "meta":
                raise
            inputs = make(batch)
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), inputs)


def on_meta(inputs: Any) -> Any:
    """Move `inputs` to the meta device, where they have no data."""
    return pytree.tree_map_only(Tensor, lambda t: t.to("meta"), inputs)


def side_of(inputs: Any) -> int | None:
    """Height of square images among the inputs; None if there are none."""
    for t in pytree.tree_leaves(inputs):
        if isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] == t.shape[3]:
            return t.shape[3]
    return None


def batch_of(inputs: Any, default: int) -> int:
    """Number of images of these inputs: the first dimension that all tensors share.

    Args:
        inputs: tensors in any container.
        default: the result if the tensors share no first dimension.
    """
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    sizes = {t.shape[0] if t.dim() else None for t in tensors}
    size = sizes.pop() if len(sizes) == 1 else None
    return size or default
