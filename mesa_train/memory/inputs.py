"""Inputs of another batch size, made from those at hand."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def resized(inputs: Any, own: int, batch: int, data: bool) -> Any:
    """`inputs` of `own` images as if they were `batch`: repeated and cut along the first dimension,
    or on the meta device if without `data`. None where a tensor has no such dimension."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != own for t in tensors):
        return None

    def resize(tensor: Tensor) -> Tensor:
        if not data:
            return tensor.new_empty(batch, *tensor.shape[1:], device="meta")
        times = -(-batch // own)
        return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch].clone()

    return pytree.tree_map_only(Tensor, resize, inputs)
