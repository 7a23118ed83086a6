"""Matmuls with a matrix that round as PyTorch's do when it records.

Why: one operand has three or more dims, the other is a matrix. PyTorch computes one matmul or a
batch of matmuls (`should_fold` in ATen's LinearAlgebra.cpp). The two may round differently. If the
strides allow both, PyTorch folds only if the matrix requires a gradient. A row computes under
`no_grad`, in which a transposed weight and autocast's copy of a weight require no gradient.

How: for these operands, a row lets PyTorch record, but saves nothing of the record.

Cost: about 20 us a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.stash.recorder import Recorder
from mesa_train.stash.tensors import autocasts


def folded(
    recorder: Recorder, func: Any, left: Tensor, right: Tensor, *rest: Any, transposed: bool = False
) -> Tensor:
    """func(left, right, *rest), computed as PyTorch does when it records, without a record.

    Args:
        recorder: the recorder of the call.
        func: the matmul function.
        left: the left operand.
        right: the right operand.
        rest: more arguments of `func`.
        transposed: `right` is the weight of a Linear. Default False.
    Returns:
        The output.
    """
    if (
        torch.compiler.is_compiling()
        or not _depends(left, right, transposed)
        or not torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    ):
        return recorder.exactly(func, left, right, *rest)
    return recorder.exactly(_recorded, func, left, right, *rest)


def _depends(left: Tensor, right: Tensor, transposed: bool) -> bool:
    """True if PyTorch's choice depends on a gradient that only a recorded call requires."""
    first = left.dim() >= right.dim()
    large, small = (left, right) if first else (right, left)
    if large.dim() < 3 or small.dim() > 2 or not small.requires_grad:
        return False
    # A matrix that is neither transposed nor cast also requires its gradient under `no_grad`.
    if not transposed and not autocasts(left.device.type):
        return False
    return not first or not _is_matrix(large)


def _is_matrix(tensor: Tensor) -> bool:
    """True if all dims but the last are one dim in memory."""
    shape, stride = tensor.shape, tensor.stride()
    return all([stride[i] == stride[i + 1] * shape[i + 1] for i in range(tensor.dim() - 2)])


def _recorded(func: Any, *args: Any) -> Tensor:
    """func(*args), recorded for aliases of the tensors, with nothing saved."""
    given = [
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args
    ]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing):
        return func(*given).detach()


def _nothing(tensor: Any) -> Any:
    return None
