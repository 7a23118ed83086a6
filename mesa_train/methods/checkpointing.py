"""Checkpoint every block, a baseline: save a block's input and recompute the rest.

The blocks of a model are found without their names. A row is an `nn.ModuleList` or `nn.Sequential`
of modules of one class. Blocks are the innermost modules that stand in a row and have at least two
weight matrices. These are every Block of a ViT, of each Swin stage and of a Hugging Face encoder.
The ConvNormAct of a stem has a single weight and is no block.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class NoBlocks(ValueError):
    """The model has no row of equal blocks."""


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Find the repeated blocks of `model`.

    Returns:
        The blocks by qualified name, in the order of the model; empty if there are none.
    """
    return dict(_blocks(model, ""))


@contextlib.contextmanager
def checkpointed(model: nn.Module, offload: bool = False) -> Iterator[None]:
    """Within the context, every block is checkpointed (non-reentrant).

    Args:
        model: the module.
        offload: keep the inputs of the blocks in CPU memory until the backward.

    Raises:
        NoBlocks: the model has no blocks.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise NoBlocks(
            f"{type(model).__name__} has no row of equal blocks in a ModuleList or Sequential, so it "
            "cannot be checkpointed block by block"
        )
    forwards = [(block, vars(block).get("forward")) for block in blocks.values()]
    try:
        for block in blocks.values():
            # Python finds the instance's attribute before the method of its class.
            run = functools.partial(checkpoint, block.forward, use_reentrant=False)
            vars(block)["forward"] = functools.partial(_offloaded, run) if offload else run
        yield
    finally:
        for block, forward in forwards:
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward


def _offloaded(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a checkpoint whose inputs are saved in CPU memory."""
    pinned = torch.cuda.is_available()
    with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
        return run(*args, **kwargs)


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The innermost blocks below a module, with their qualified names."""
    in_row = _is_row(module)
    for name, child in module.named_children():
        qualified_name = f"{path}.{name}" if path else name
        nested = list(_blocks(child, qualified_name))
        if in_row and not nested:
            yield qualified_name, child
        yield from nested


def _is_row(module: nn.Module) -> bool:
    """True if `module` is a row of blocks of one class, each with at least two weight matrices."""
    elements = list(module.children())
    return (
        isinstance(module, nn.ModuleList | nn.Sequential)
        and len({type(element) for element in elements}) == 1
        and not isinstance(elements[0], nn.ModuleList)
        and all(
            sum(parameter.dim() >= 2 for parameter in element.parameters()) >= 2
            for element in elements
        )
    )
