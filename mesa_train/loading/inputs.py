"""Make inputs of another batch size, from existing inputs or by a function of the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NO_BATCH = (
    "no other batch size can be computed: an input has no batch dimension; return a function of the "
    "batch size for that"
)


def resized(
    inputs: Any, own: int, batch: int, data: bool, make: Callable[[int], Any] | None = None
) -> Any:
    """Make inputs of `batch` images.

    Args:
        inputs: inputs of `own` images.
        own: their number of images.
        batch: number of images of the result.
        data: False returns tensors on the meta device.
        make: function of the batch size that makes the inputs; None repeats and cuts `inputs` along
            the first dimension.

    Returns:
        The inputs; None if a tensor has no such dimension.
    """
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    if make is not None and tensors:
        return _made(make, batch, tensors[0].device if data else torch.device("meta"))
    if not tensors or any(t.dim() == 0 or t.shape[0] != own for t in tensors):
        return None

    def resize(tensor: Tensor) -> Tensor:
        if not data:
            return tensor.new_empty(batch, *tensor.shape[1:], device="meta")
        times = -(-batch // own)
        return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch].clone()

    return pytree.tree_map_only(Tensor, resize, inputs)


def _made(make: Callable[[int], Any], batch: int, device: torch.device) -> Any:
    """Call the function of the batch size; on the CPU if it needs values and `device` is meta."""
    with torch.random.fork_rng(devices=[]):
        try:
            with device:
                made = make(batch)
        except (NotImplementedError, RuntimeError):
            if device.type != "meta":
                raise
            made = make(batch)
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), made)


def on_meta(inputs: Any) -> Any:
    """Move `inputs` to the meta device, where they have no data."""
    return pytree.tree_map_only(Tensor, lambda t: t.to("meta"), inputs)


def side_of(inputs: Any) -> int | None:
    """Height of square images among the inputs; None if there are none."""
    for t in pytree.tree_leaves(inputs):
        if isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] == t.shape[3]:
            return t.shape[3]
    return None


def batch_of(inputs: Any, asked: int) -> int:
    """Number of images of these inputs: the first dimension that all tensors share.

    Args:
        inputs: tensors in any container.
        asked: the result if the tensors share no first dimension.
    """
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    shared = {t.shape[0] if t.dim() else None for t in tensors}
    first = shared.pop() if len(shared) == 1 else None
    return first or asked
