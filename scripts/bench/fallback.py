"""Measurement of the saved tensors that tolerate codes.

The script measures the gradient error of every differentiable function of torch.

Each call runs twice: in plain PyTorch, and with 8-bit codes of every float tensor that the call
saves, independent of the library's own choice. A third run replaces the saved tensors by NaN. It
shows whether the backward reads more than their size.

One row for each call goes to docs/results/fallback.jsonl, from which docs/fallback.md is generated.
The functions come from PyTorch's own list of tested operators and from fallback_cases.

    python scripts/bench/fallback.py
    python scripts/bench/fallback.py --functions sin,grid_sample
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from fallback_cases import Call, full_name, named, pointwise
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils._pytree import tree_leaves

from mesa_train import codecs
from mesa_train.stash.stash import MatrixLayout
from mesa_train.utils import records
from mesa_train.utils.records import Row

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/fallback.jsonl"
SAMPLES = 4  # PyTorch's own samples, per function
FAILED = 1e9  # error if codes make the backward fail, or if the plain gradient is 0
# Calls that use a saved float as an index would read outside their memory if it were NaN.
INDEXED = ("grid_sample", "grid_sampler_2d", "grid_sampler_3d", "roi", "deform_conv2d")


def main(
    functions: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Measure every call."""
    warnings.simplefilter("ignore")
    selected = {f.strip() for f in functions.split(",") if f.strip()}
    origin = records.provenance()
    torch.manual_seed(0)
    for call in calls():
        if not selected or call.function in selected:
            row = measured(call)
            if row is not None:
                records.append(out, {**row, **origin})


def calls() -> Iterator[Call]:
    """The calls written by hand, then torch's functions on large tensors and torch's samples."""
    yield from named()
    for op in op_db:
        if op.supports_autograd and torch.float32 in op.supported_backward_dtypes("cpu"):
            yield from pointwise(op)
            yield from _samples(op)


def _samples(op: OpInfo) -> Iterator[Call]:
    """A function's calls on PyTorch's own samples."""
    samples = op.sample_inputs("cpu", torch.float32, requires_grad=True)
    for number, sample in enumerate(itertools.islice(samples, SAMPLES)):
        arguments = (sample.input, *sample.args, *sample.kwargs.values())
        leaves = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]

        def call(*_: Tensor, sample: Any = sample) -> Any:
            return op(sample.input, *sample.args, **sample.kwargs)

        yield Call(full_name(op), f"PyTorch's sample {number}", call, leaves)


def measured(call: Call) -> Row | None:
    """The row of a call.

    None if the call fails in plain PyTorch, saves no floats, or has no finite gradient.
    """
    leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in call.tensors]
    if any(t.layout is not torch.strided for t in leaves) or not leaves:
        return None
    saved_sizes: list[int] = []
    try:
        plain = _gradients(call, leaves, lambda t: t, saved_sizes)
    except Exception:  # an input outside of a function's domain
        return None
    if (
        not saved_sizes
        or not plain
        or not all(bool(g.isfinite().all()) for g in plain if g is not None)
    ):
        return None
    only_input = "input alone" in call.function
    first = leaves[0].untyped_storage()._cdata

    def is_coded(t: Tensor) -> bool:
        return not only_input or t.untyped_storage()._cdata == first

    try:
        coded = _gradients(call, leaves, lambda t: _coded(t) if is_coded(t) else t)
        error = max(_error(a, b) for a, b in zip(coded, plain, strict=True))
    except Exception:  # an index out of range, a matrix that is no longer positive
        error = FAILED
    sizes = bool(saved_sizes) and not any(word in call.function for word in INDEXED)
    if sizes:
        try:
            blank = _gradients(call, leaves, lambda t: torch.full_like(t, math.nan))
            sizes = all(_same(a, b) for a, b in zip(plain, blank, strict=True))
        except Exception:
            sizes = False
    return {
        "function": call.function,
        "inputs": call.inputs,
        "saved_bytes": sum(saved_sizes),
        "sizes_alone": sizes,
        # The error of the worst gradient.
        "error": error,
    }


def _gradients(
    call: Call,
    leaves: list[Tensor],
    replace: Callable[[Tensor], Tensor],
    sizes: list[int] | None = None,
) -> list[Tensor | None]:
    """The gradients of the leaves if `replace` is applied to every saved float tensor."""

    def pack(tensor: Tensor) -> Tensor:
        if (
            not tensor.is_floating_point()
            or tensor.layout is not torch.strided
            or tensor.dim() == 0
        ):
            return tensor.detach()
        if sizes is not None:
            sizes.append(tensor.numel() * tensor.element_size())
        with torch.no_grad():
            return replace(tensor.detach())

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = call.call(*leaves)
    outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not outputs:
        return []
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    return list(torch.autograd.grad(outputs, leaves, weights, allow_unused=True))


def _coded(tensor: Tensor) -> Tensor:
    """A tensor after 8-bit coding and decoding; unchanged with one element per group."""
    if not tensor.numel() or tensor.shape[-1] == 1:
        return tensor
    layout, matrix = MatrixLayout.of(tensor, (tensor.dim() - 1,))
    codec = codecs.of(8, 128, "nearest", False)
    codes = codec.encode(matrix)
    return layout.restore(codec.decode(codes, layout.cols, tensor.dtype))


def _error(gradient: Tensor | None, exact: Tensor | None) -> float:
    """Relative L2 distance of a gradient."""
    if gradient is None or exact is None or not exact.numel():
        return 0.0
    distance, size = (gradient - exact).double().norm().item(), exact.double().norm().item()
    return 0.0 if distance == 0 else min(distance / size, FAILED) if size else FAILED


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """True if two gradients are equal or both missing."""
    return (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
