"""Softmax.

Saves the codes of its output (1 byte per element). The derivative reads only the output, and the
matmul behind shares these codes. The input is never saved.

With `recompute="linear"` it saves nothing if a matmul rebuilds its input: the scores of attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.codecs.affine import Affine
from mesa_train.policy import CHEAP, MATMUL
from mesa_train.stash.recipes import Recompute
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Leaf, MatrixLayout, Saved, Stash

from .base import Operator, derivative


class Softmax(Operator):
    """Softmax.

    inputs: x.
    stashes: the output.
    static: dim.
    """

    @derivative("softmax")
    def backward(saved: Saved, dim: int, needs: tuple[bool, ...], grad: Tensor) -> tuple[Any, ...]:
        spec = saved.specs[0]
        assert spec is not None
        leaf = spec.recipe
        if (
            isinstance(leaf, Leaf)
            and isinstance(leaf.codec, Affine)
            and grad.dtype != torch.float64
        ):
            layout = leaf.layout
            if layout.cols == grad.shape[dim] and layout.order[-1] == dim % grad.dim():
                rows = grad.permute(layout.order).reshape(-1, layout.cols)
                codes = saved.own(spec)
                dx = leaf.codec.softmax_backward((codes[0], codes[1]), rows)
                return (layout.restore(dx),)
        weighted = grad * saved.get(0, grad.dtype)
        return (weighted - saved.get(0, grad.dtype) * weighted.sum(dim, keepdim=True),)


def softmax(
    recorder: Recorder,
    func: Any,
    /,
    input: Tensor,
    dim: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Row of torch.softmax, Tensor.softmax and torch.nn.functional.softmax."""
    if dim is None or not recorder.covers("softmax", input):
        return NotImplemented
    scores = recorder.lineage.get(input)
    if scores is not None and scores.cost == MATMUL and _rebuilds(recorder):
        result = recorder.exactly(func, input, dim, *args, **kwargs)
        recipe = Recompute(torch.softmax, (dim,), {"dtype": result.dtype})
        stash = Stash(recipe, (), (scores,), cost=CHEAP, dtype=result.dtype)
        recorder.report.add(recorder.context.name, "softmax", "output", "rebuilt", 0, stash)
        output = Softmax.apply(result, (stash,), dim, input)
        recorder.lineage.set(output, stash)
        return output
    last = input.dim() > 0 and dim % input.dim() == input.dim() - 1
    dtype = None if args or not last else _dtype(input, kwargs)
    codec = None
    if dtype is not None:
        weights = input.detach().new_empty(input.shape, dtype=dtype, device="meta")
        codec = recorder.fused("softmax", "output", dtype, weights)
    if codec is not None and dtype is not None:
        with torch.no_grad():
            result, codes = codec.softmax(input.detach().reshape(-1, input.shape[-1]), dtype)
        layout = MatrixLayout(tuple(input.shape), tuple(range(input.dim())), input.shape[-1])
        stash = recorder.leaf(codec, codes, layout, dtype, "softmax", "output")
        result = layout.restore(result)
    else:
        result = recorder.exactly(func, input, dim, *args, **kwargs)
        stash = recorder.keep(result, "softmax", "output")
    output = Softmax.apply(result, (stash,), dim, input)
    recorder.lineage.set(output, stash)
    return output


def _rebuilds(recorder: Recorder) -> bool:
    """True if the policy rebuilds attention weights by a matmul."""
    return recorder.context.rules["softmax", "output"].rebuild_linear


def _dtype(input: Tensor, kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype of the output as PyTorch chooses it; None if there are other keywords."""
    if not kwargs.keys() <= {"dtype", "_stacklevel"}:
        return None
    device = input.device.type
    narrow = input.dtype in (torch.float16, torch.bfloat16)
    # CUDA's autocast runs softmax in float32.
    wide = narrow and device != "cpu" and torch.is_autocast_enabled(device)
    chosen = kwargs.get("dtype") or (torch.float32 if wide else input.dtype)
    return chosen if chosen in (torch.float32, torch.float16, torch.bfloat16) else None
