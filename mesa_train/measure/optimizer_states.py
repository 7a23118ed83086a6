"""Bytes that a step has all the time, by arithmetic: optimizer states, weights, buffers and inputs.

AdamW keeps two moments, in full or in 8 bits. An optimizer that steps inside the backward keeps one moment at most
(`mesa_train.training.optim.optimizer_in_backward`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mesa_train.codecs.affine import Affine

# Adafactor's row and column means, or Lion's moment in 8-bit codes.
IN_BACKWARD = ("factored", "lion")
OPTIMIZERS = ("adamw", "adamw8bit", *IN_BACKWARD)
# Elements of a matrix that an optimizer in the backward updates at a time.
UPDATE = 1 << 24
# Elements in a group of Lion's codes.
LION_GROUP = 128
# bitsandbytes keeps tensors below this many elements in 32 bits, and a float32 range for every
# block of this many elements of the others.
LEAST_8BIT, _BLOCK = 4096, 256
# The step count of torch's AdamW, a float32 scalar a parameter.
_STEP = 4


def adamw_bytes(elements: int, itemsize: int, eight_bit: bool = False) -> int:
    """Bytes of AdamW's states of one parameter.

    elements, itemsize: of the parameter; torch keeps its moments in the same dtype. eight_bit:
    bitsandbytes' AdamW8bit, whose small tensors have float32 moments.
    """
    if not eight_bit:
        return 2 * elements * itemsize + _STEP
    if elements < LEAST_8BIT:
        return 8 * elements
    return 2 * (elements + 4 * -(-elements // _BLOCK))


def in_backward_bytes(shape: Sequence[int], optimizer: str) -> int:
    """Bytes of the states of one parameter of `shape` that is stepped in the backward."""
    rows = shape[0] if len(shape) > 1 else 1
    columns = math.prod(shape) // max(rows, 1)
    if optimizer == "factored":
        return 4 * (rows + columns if len(shape) > 1 else columns)
    return Affine(8, LION_GROUP).bytes(rows, columns)


def static_bytes(model: nn.Module, inputs: Any, optimizer_bytes: int | None = None) -> int:
    """Bytes that are there all the time: parameters, buffers, inputs, and the optimizer's states, by
    default AdamW's of the trained parameters."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    if optimizer_bytes is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer_bytes = sum(adamw_bytes(p.numel(), p.element_size()) for p in trained)
    own = {
        id(t) if t.device.type == "meta" else t.data_ptr(): t
        for t in (*model.parameters(), *model.buffers(), *tensors)
    }
    return optimizer_bytes + sum(t.nbytes for t in own.values())
