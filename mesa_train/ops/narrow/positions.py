"""Tables of positions: sin and cos of rotary positions that a model computes in each layer.

A product with such a table saves the table (PyTorch's rule), so every layer saves its own. A table
needs no gradient, and it is computed from small tensors: positions and frequencies. Here its stash
is a recipe over these small tensors. The functions of the forward run again, so the rebuilt table
equals the table bit for bit.

A model that computes its tables once, and passes them to all layers, saves them once. It gets no
recipe.

Cost: the backward computes the table again for each product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mesa_train.ops.base import Operator, derivative, kept_first, sum_to
from mesa_train.ops.fallback import fallback
from mesa_train.policy import CHEAP, MATMUL, VIEW
from mesa_train.stash.recipes import Recompute, Replay
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import WHOLE, Saved, Stash, uncompressed
from mesa_train.stash.tensors import is_plain


class TimesTable(Operator):
    """A product with a table.

    inputs: x.
    stashes: the table.
    static: the shape of x.
    """

    @derivative("mul")
    def backward(
        saved: Saved, shape: tuple[int, ...], needs: tuple[bool, ...], grad: Tensor
    ) -> tuple[Any, ...]:
        return (sum_to(grad * saved[0], shape),)


def outer_product(
    recorder: Recorder, input: Tensor, other: Tensor, output: Tensor, recipe: Any
) -> Stash | None:
    """The stash of a product of two constants that broadcasting widens, else None.

    Positions times frequencies are such a product. The factors are copied, because no node saves
    them at their present version.

    Args:
        recorder: the recorder of the call.
        input: a factor.
        other: a factor.
        output: the product.
        recipe: the recipe of a product of two sources.
    """
    if (
        torch.compiler.is_compiling()
        or input.requires_grad
        or other.requires_grad
        or not output.is_floating_point()
        or not (is_plain(input) and is_plain(other))
        or 4 * (input.numel() + other.numel()) > output.numel()
    ):
        return None
    sources = tuple([copied(recorder, factor) for factor in (input, other)])
    return Stash(recipe, (), sources, cost=CHEAP, dtype=output.dtype)


def copied(recorder: Recorder, factor: Tensor) -> Stash:
    """The stash of a copy of a constant: one copy for all views that only add dims of size 1."""
    base = factor._base
    if (
        base is None
        or base.numel() != factor.numel()
        or not (base.is_contiguous() and factor.is_contiguous())
    ):
        base = factor
    stash = recorder.lineage.get(base)
    if stash is None or stash.recipe is not WHOLE:
        stash = uncompressed(base.detach().clone())
        recorder.lineage.set(base, stash)
    if base is factor:
        return stash
    view = Replay(Tensor.view, (factor.shape,), {})
    return Stash(view, (), (stash,), cost=VIEW, dtype=factor.dtype)


def times_table(
    recorder: Recorder, func: Any, factor: Tensor, table: Tensor, input: Tensor, other: Tensor
) -> Any:
    """A product of a tensor that needs a gradient with a table that has a recipe.

    Args:
        recorder: the recorder of the call.
        func: the product.
        factor: the factor that needs a gradient.
        table: the other factor.
        input: the first argument of `func`.
        other: the second argument of `func`.
    Returns:
        The product; NotImplemented if the table has no recipe, or if the policy saves it.
    """
    stash = recorder.lineage.get(table)
    if (
        stash is None
        or stash.cost == MATMUL
        or not recorder.covers("mul", factor, table)
        or not recorder.context.rules["mul", "right"].rebuild_cheap
        or not stash.exact()
    ):
        return NotImplemented
    kept = kept_first(recorder, stash)
    result = recorder.exactly(func, input, other)
    recorder.report.add(recorder.context.name, "mul", "right", "rebuilt", 0, stash)
    return TimesTable.apply(result, kept, tuple(factor.shape), factor)


def function_of_table(name: str) -> Any:
    """Row of torch.sin or torch.cos, whose result is rebuilt if it needs no gradient."""
    recipe = Recompute(getattr(torch, name), (), {})

    def row(recorder: Recorder, func: Any, /, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = fallback(recorder, func, (input, *args), kwargs)
        if isinstance(input, Tensor) and not input.requires_grad and not (args or kwargs):
            source = recorder.lineage.get(input)
            if source is not None and source.cost < MATMUL and output.is_floating_point():
                stash = Stash(recipe, (), (source,), cost=CHEAP, dtype=output.dtype)
                recorder.lineage.set(output, stash)
        return output

    return row
