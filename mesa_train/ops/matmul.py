"""Matrix products: matmul, mm, bmm, addmm, baddbmm, einsum of two operands.

Saves the stashes of both operands, or of one operand if the other operand needs no gradient.
Parameters stay uncompressed. Cost: 1 byte per element at 8 bits; nothing if the operand is the
output of a softmax or a norm.

With `recompute="linear"` the scores of attention that a model writes out are rebuilt from queries and
keys, which the product saves anyway. So their softmax saves nothing (`softmax.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.policy import MATMUL
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash
from mesa_train.stash.tensors import of_parameter

from .base import Operator, derivative, distinct, kept_first, sum_to
from .folding import folded


class MatMul(Operator):
    """A matrix product.

    inputs: left (..., n, k), right (..., k, m), both at least 2-D.
    stashes: left, right.
    static: their shapes.
    """

    @derivative("matmul")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        left_shape, right_shape = static
        dleft = dright = None
        if len(right_shape) == 2:
            # One matmul over all leading dims. Batched matmuls would copy the right operand for
            # each sample. They would also compute a gradient of it for each sample and sum these
            # gradients.
            flat = grad.reshape(-1, grad.shape[-1])
            if needs[0]:
                dleft = (flat @ saved.get(1, grad.dtype).mT).view(left_shape)
            if needs[1]:
                left = saved.get(0, grad.dtype)
                dright = left.reshape(-1, left.shape[-1]).t() @ flat
            return dleft, dright
        if needs[0]:
            dleft = sum_to(grad @ saved.get(1, grad.dtype).mT, left_shape)
        if needs[1]:
            dright = sum_to(saved.get(0, grad.dtype).mT @ grad, right_shape)
        return dleft, dright


class AddMatMul(Operator):
    """addmm and baddbmm.

    inputs: base, left, right.
    stashes: left, right.
    static: the shape of base, beta, alpha.
    """

    @derivative("matmul")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        base_shape, beta, alpha = static
        dleft = alpha * (grad @ saved.get(1, grad.dtype).mT) if needs[1] else None
        dright = alpha * (saved.get(0, grad.dtype).mT @ grad) if needs[2] else None
        return beta * sum_to(grad, base_shape) if needs[0] else None, dleft, dright


class Einsum(Operator):
    """einsum of two operands.

    inputs: left, right.
    stashes: left, right.
    static: the subscripts of left, right and output.
    """

    @derivative("matmul")
    def backward(
        saved: Saved, static: Any, needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        left, right, out = static
        dleft = (
            torch.einsum(f"{out},{right}->{left}", grad, saved.get(1, grad.dtype))
            if needs[0]
            else None
        )
        dright = (
            torch.einsum(f"{out},{left}->{right}", grad, saved.get(0, grad.dtype))
            if needs[1]
            else None
        )
        return dleft, dright


class MatrixProduct:
    """Recipe: the product of two sources, computed in the dtype of the forward."""

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        left, right = [saved.value(source, spec.dtype) for source in spec.sources]
        return (left @ right).to(dtype)


MATRIX_PRODUCT = MatrixProduct()


def matmul(
    recorder: Recorder, func: Any, /, input: Tensor, other: Tensor | None = None, **kwargs: Any
) -> Any:
    """Row of torch.matmul, mm, bmm and the operator @."""
    if (
        kwargs
        or other is None
        or not recorder.covers("matmul", input, other)
        or input.dim() < 2
        or other.dim() < 2
        or not other.numel()
    ):
        return NotImplemented
    stashes = _operands(recorder, input, other)
    kept = kept_first(recorder, *stashes)
    result = folded(recorder, func, input, other)
    output = MatMul.apply(
        result, kept, (tuple(input.shape), tuple(other.shape)), *distinct(input, other)
    )
    left, right = stashes
    if left is not None and right is not None and _are_scores(recorder, input, other):
        stash = Stash(MATRIX_PRODUCT, (), (left, right), cost=MATMUL, dtype=result.dtype)
        recorder.lineage.set(output, stash)
    return output


def _are_scores(recorder: Recorder, left: Tensor, right: Tensor) -> bool:
    """True if a product is to be rebuilt: of two activations, and no narrower than the left one.

    Attention's scores, or the scores of all pairs of a contrastive loss.
    """
    return (
        recorder.context.rules.rebuilds_matmuls
        and not torch.compiler.is_compiling()
        and (right.dim() > 2 or left.dim() == 2)
        and right.shape[-1] >= left.shape[-1]
        and not of_parameter(right)
        and not (left.dim() == 2 and of_parameter(left))
    )


def reversed_matmul(recorder: Recorder, func: Any, /, other: Tensor, input: Tensor) -> Any:
    """Row of Tensor.__rmatmul__."""
    return matmul(recorder, torch.matmul, input, other)


def add_matmul(
    recorder: Recorder, func: Any, /, input: Tensor, *factors: Tensor, **kwargs: Any
) -> Any:
    """Row of addmm and baddbmm."""
    if (
        kwargs.keys() - {"beta", "alpha"}
        or len(factors) != 2
        or not recorder.covers("matmul", input, *factors)
    ):
        return NotImplemented
    left, right = factors
    stashes = kept_first(recorder, *_operands(recorder, left, right))
    result = recorder.exactly(func, input, left, right, **kwargs)
    static = (tuple(input.shape), kwargs.get("beta", 1), kwargs.get("alpha", 1))
    return AddMatMul.apply(result, stashes, static, *distinct(input, left, right))


def einsum(recorder: Recorder, func: Any, /, equation: Any, *operands: Any) -> Any:
    """Row of torch.einsum for two operands.

    Each index is contracted or is an index of the output.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if (
        not isinstance(equation, str)
        or len(operands) != 2
        or not recorder.covers("matmul", *operands)
    ):
        return NotImplemented
    subscripts = _subscripts(equation, *operands)
    if subscripts is None:
        return NotImplemented
    stashes = kept_first(recorder, *_operands(recorder, *operands))
    result = recorder.exactly(func, equation, *operands)
    return Einsum.apply(result, stashes, subscripts, *distinct(*operands))


def _operands(recorder: Recorder, left: Tensor, right: Tensor) -> tuple[Stash | None, Stash | None]:
    """The stashes of the operands that the gradients need."""
    return (
        recorder.keep(left, "matmul", "left", _within(left)) if right.requires_grad else None,
        recorder.keep(right, "matmul", "right", _within(right)) if left.requires_grad else None,
    )


def _within(operand: Tensor) -> tuple[int, ...]:
    """The dims that one group of codes may span.

    The first is the dim of the features, also if the operand is transposed. The heads of the same
    token may be included if they are next to the features in memory, as in fused attention.
    """
    if operand.dim() < 4:
        return (-1,)
    return (-3, -2 if operand.stride(-2) == 1 and operand.stride(-1) != 1 else -1)


def _subscripts(equation: str, left: Tensor, right: Tensor) -> tuple[str, str, str] | None:
    """(left, right, out) if both gradients are einsums of the same indices, else None."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or "." in equation:
        return None
    a, b = terms
    sizes: dict[str, int] = {}
    for term, tensor in ((a, left), (b, right)):
        for index, size in zip(term, tensor.shape, strict=False):
            if sizes.setdefault(index, size) != size:
                return None
    distinct = len(set(a)) == len(a) and len(set(b)) == len(b)
    survive = set(a) <= set(b) | set(out) and set(b) <= set(a) | set(out)
    return (a, b, out) if distinct and survive else None
