"""Count the floating-point operations of a forward, by module and operator, with PyTorch's counter.

A multiply-add counts as two operations. `torch.utils.flop_counter` counts matrix products, convolutions
and attention. It does not count norms, activations, sums, softmax outside of attention, or operators of
other libraries. PyTorch's counter has no rule for attention on a CPU, so this file adds it.

A backward has about twice the operations of its forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mesa_train.methods.apply import PLAIN, applied

from .footprint import target_of
from .isolation import isolated
from .step import arguments, autocasting


@dataclasses.dataclass(frozen=True)
class Flops:
    """The operations of one forward. A multiply-add is two.

    Args:
        total: of the whole forward.
        by_module: of each module without its submodules, by qualified name; "" is the model.
        by_operator: by PyTorch's operator, largest first.
    """

    total: int
    by_module: dict[str, int]
    by_operator: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain Python values."""
        return dataclasses.asdict(self)


def flops(
    model: nn.Module,
    inputs: Any,
    *,
    autocast: torch.dtype | None = None,
    device: str | torch.device | None = None,
    fake: bool = False,
) -> Flops:
    """Count the operations of `model(inputs)`, in the mode (training or not) that the model is in.

    The model and the random state do not change.

    Args:
        model: the module to count.
        inputs, autocast, device, fake: as for `footprint`.

    Returns:
        A `Flops`, of all inputs.

    Raises:
        ValueError: an argument is out of range, or the forward needs values that fake tensors do not
            have.
    """
    args, kwargs = arguments(inputs)
    target, fake_model = target_of(model, device, fake, autocast)
    if fake_model is not None:
        args, kwargs = fake_model.of(args), fake_model.of(kwargs)
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with contextlib.ExitStack() as stack:
        stack.enter_context(applied(model, PLAIN))
        stack.enter_context(isolated(model, fake_model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(autocasting(target, autocast))
        stack.enter_context(counter)
        model(*args, **kwargs)
    counts = {module: sum(own.values()) for module, own in counter.get_flop_counts().items()}
    total = counts.pop("Global", 0)
    by_operator = {
        str(operator).removeprefix("aten."): count
        for operator, count in counter.get_flop_counts().get("Global", {}).items()
    }
    return Flops(
        total,
        _own(counts, type(model).__name__, total),
        dict(sorted(by_operator.items(), key=lambda item: -item[1])),
    )


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:  # noqa: ARG001
    """Operations of attention, from the shapes of its inputs."""
    return int(sdpa_flop_count(query, key, value))


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def _own(counts: dict[str, int], root: str, total: int) -> dict[str, int]:
    """Operations of each module without its submodules, in the order of the forward.

    Args:
        counts: of each module with its submodules, by name; the names begin with `root`.
        root: class of the model.
        total: of the model, whose own function calls belong to no module of `counts`.
    """
    by_name = {name.removeprefix(root).removeprefix("."): count for name, count in counts.items()}
    by_name[""] = total
    own = dict(by_name)
    for name, count in by_name.items():
        if name:
            own[_parent(name, by_name)] -= count
    return {name: count for name, count in own.items() if count}


def _parent(name: str, names: dict[str, int]) -> str:
    """The innermost counted module that contains a module; "" is the model."""
    while name:
        name = name.rpartition(".")[0]
        if name in names:
            return name
    return ""
