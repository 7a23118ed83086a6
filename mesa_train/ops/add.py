"""Sums of two matmul outputs, and of two factors that broadcasting widens.

Examples of the first are a frozen Linear plus its adapter (LoRA), and attention plus MLP in
parallel. Examples of the second are decomposed relative positions (SAM, MViT): the mask of N x N
scores is a sum of two tensors of N x sqrt(N) elements.

An addition saves nothing. Its row records how to rebuild the sum if both terms are rebuilt by a
matmul. So queries, keys, values and an MLP's hidden layer are rebuilt behind an adapter
(`recompute="linear"`), as they are behind a single Linear.

A third kind is a sum of such an output and a small tensor: scores plus relative positions or a mask.
The small tensor is copied, once for all layers that add it.

A sum of a tensor with a stash and a number is rebuilt from that stash, unless a matmul rebuilds the
tensor.

Cost: a residual stream has no such terms, and there the row costs two lookups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.policy import CHEAP, MATMUL
from mesa_train.stash.recipes import Recompute
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Saved, Spec, Stash, uncompressed
from mesa_train.stash.tensors import is_plain

from .fallback import fallback
from .narrow.numbers import constants
from .narrow.positions import copied


class Sum:
    """Recipe: the sum of two sources, each in the dtype of the forward."""

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        left, right = [saved.value(source) for source in spec.sources]
        return (left + right).to(dtype)


SUM = Sum()


def add(recorder: Recorder, func: Any, /, input: Any, other: Any, **kwargs: Any) -> Any:
    """Row of torch.add, Tensor.add, `+` and `+=`."""
    left, right = _matmul(recorder, input), _matmul(recorder, other)
    shape = None if left is None else input.shape
    output = fallback(recorder, func, (input, other), kwargs)
    if kwargs:
        return output
    if isinstance(other, (int, float)) and isinstance(input, Tensor):
        return _shifted(recorder, input, other, output)
    if recorder.context.rules.rebuilds_matmuls and _widens(input, other, output):
        # Copies, because no node saves the factors at their present version.
        sources = tuple([uncompressed(t.detach().clone()) for t in (input, other)])
        recorder.lineage.set(output, Stash(SUM, (), sources, cost=CHEAP, dtype=output.dtype))
        return output
    terms = () if output.requires_grad else constants(recorder, input, other, output)
    if terms:
        recorder.lineage.set(output, Stash(SUM, (), terms, cost=CHEAP, dtype=output.dtype))
    elif left is not None and right is not None and input.shape == other.shape:
        recorder.lineage.set(output, Stash(SUM, (), (left, right), cost=CHEAP, dtype=output.dtype))
    elif left is not None and right is None and small_term(recorder, other, shape, output):
        sources = (left, copied(recorder, other))
        recorder.lineage.set(output, Stash(SUM, (), sources, cost=CHEAP, dtype=output.dtype))
    return output


def small_term(recorder: Recorder, term: Any, shape: torch.Size | None, output: Tensor) -> bool:
    """True if a term takes at most half of the sum's 8-bit codes. `shape`: of the other term."""
    return (
        recorder.context.rules.rebuilds_matmuls
        and not torch.compiler.is_compiling()
        and isinstance(term, Tensor)
        and is_plain(term)
        and term.is_floating_point()
        and output.shape == shape
        and 2 * term.nbytes <= output.numel()
    )


def _shifted(recorder: Recorder, input: Tensor, number: float, output: Tensor) -> Tensor:
    """`output`, the sum of a tensor and a number, with a stash if the tensor has one."""
    source = recorder.lineage.get(input)
    if source is None or source.cost == MATMUL:
        return output
    if output is not input and output.is_floating_point():
        replay = Recompute(torch.add, (number,), {})
        recorder.lineage.set(output, Stash(replay, (), (source,), cost=CHEAP, dtype=output.dtype))
    return output


def _widens(input: Any, other: Any, output: Any) -> bool:
    """True if a sum has at least four times as many elements as both factors together.

    False while tracing, because sizes may be symbolic.
    """
    return (
        not torch.compiler.is_compiling()
        and isinstance(input, Tensor)
        and isinstance(other, Tensor)
        and is_plain(input)
        and is_plain(other)
        and output.requires_grad
        and output.is_floating_point()
        and output.dim() > 2
        and 4 * (input.numel() + other.numel()) <= output.numel()
    )


def _matmul(recorder: Recorder, term: Any) -> Stash | None:
    """The stash of a term if a matmul rebuilds it, else None."""
    stash = recorder.lineage.get(term) if isinstance(term, Tensor) else None
    return stash if stash is not None and stash.cost == MATMUL else None
