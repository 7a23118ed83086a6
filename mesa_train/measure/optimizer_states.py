"""Compute the bytes that exist during the whole step: optimizer states, weights, buffers, inputs.

AdamW has two moments, in full precision or in 8 bits. An optimizer that steps inside the backward
has at most one moment (`mesa_train.training.optim.optimizer_in_backward`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mesa_train.codecs.affine import Affine

# "factored": Adafactor's row and column means. "lion": Lion's moment in 8-bit codes.
IN_BACKWARD = ("factored", "lion")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd", *IN_BACKWARD)
# Elements of a matrix that an optimizer in the backward updates at a time.
UPDATE = 1 << 24
# Elements in a group of Lion's codes.
LION_GROUP = 128
# bitsandbytes keeps tensors with fewer elements than LEAST_8BIT in 32 bits. Larger tensors have a
# float32 range for every _BLOCK elements.
LEAST_8BIT, _BLOCK = 4096, 256
# The step count of torch's AdamW: one float32 scalar for each parameter.
_STEP = 4


def adamw_bytes(elements: int, itemsize: int, eight_bit: bool = False) -> int:
    """Bytes of AdamW's states of one parameter.

    Args:
        elements: number of elements of the parameter.
        itemsize: bytes of an element of the parameter; torch keeps the moments in the same dtype.
        eight_bit: bitsandbytes' AdamW8bit, whose small tensors have float32 moments.
    """
    if not eight_bit:
        return 2 * elements * itemsize + _STEP
    if elements < LEAST_8BIT:
        return 8 * elements
    return 2 * (elements + 4 * -(-elements // _BLOCK))


def in_backward_bytes(shape: Sequence[int], optimizer: str) -> int:
    """Bytes of the states of one parameter whose optimizer steps inside the backward.

    Args:
        shape: shape of the parameter.
        optimizer: "factored" or "lion".
    """
    rows = shape[0] if len(shape) > 1 else 1
    columns = math.prod(shape) // max(rows, 1)
    if optimizer == "factored":
        return 4 * (rows + columns if len(shape) > 1 else columns)
    return Affine(8, LION_GROUP).bytes(rows, columns)


def static_bytes(model: nn.Module, inputs: Any, optimizer_bytes: int | None = None) -> int:
    """Bytes that exist during the whole step: parameters, buffers, inputs and optimizer states.

    Args:
        model: the model.
        inputs: the tensors of one batch, in any container.
        optimizer_bytes: bytes of the optimizer's states; default: AdamW's for the trained
            parameters.
    """
    tensors = [tensor for tensor in pytree.tree_leaves(inputs) if isinstance(tensor, Tensor)]
    if optimizer_bytes is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer_bytes = sum(
            adamw_bytes(parameter.numel(), parameter.element_size()) for parameter in trained
        )
    by_address = {
        id(tensor) if tensor.device.type == "meta" else tensor.data_ptr(): tensor
        for tensor in (*model.parameters(), *model.buffers(), *tensors)
    }
    return optimizer_bytes + sum(tensor.nbytes for tensor in by_address.values())
