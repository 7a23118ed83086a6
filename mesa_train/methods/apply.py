"""Put a method on a model and take it off again.

A method is a way to train a model; methods are measured against each other. Its name is "plain",
"checkpoint", "approx-bp", a preset's name, or a preset's name with "+checkpoint", "+coded" or
"+offload". A Policy is a method too. After a method is taken off, the model has its former policy
and report again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mesa_train.engine.wrap import report_of, unwrap, wrap
from mesa_train.policy import OFFLOADED, PRESETS, Policy

from .approx_bp import ApproxBP
from .checkpointing import checkpointed

PLAIN = "plain"
CHECKPOINT = "checkpoint"
APPROX_BP = "approx-bp"
SAVE_ON_CPU = "save_on_cpu"
CHECKPOINT_OFFLOAD = f"{CHECKPOINT}+offload"
METHODS = (PLAIN, "mesa8", "mesa6", "mesa4", "mesa8-recompute", "mesa4-recompute", CHECKPOINT)
# A preset whose blocks are also checkpointed.
BOTH = {f"{preset}+{CHECKPOINT}": preset for preset in PRESETS if preset != "paper"}
# A preset whose blocks are also checkpointed, with 8-bit codes of their inputs.
CODED = {f"{preset}+coded": preset for preset in PRESETS if preset != "paper"}


def check_method(method: str, extra: tuple[str, ...] = ()) -> None:
    """Check the name of a method.

    Args:
        method: the name.
        extra: further names that are allowed.

    Raises:
        ValueError: the name is unknown; the message has the choices and the closest name.
    """
    choices = (PLAIN, CHECKPOINT, APPROX_BP, *PRESETS, *BOTH, *CODED, *OFFLOADED, *extra)
    if method not in choices:
        near = difflib.get_close_matches(method, choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        shown = [choice for choice in choices if choice not in {**BOTH, **CODED, **OFFLOADED}]
        raise ValueError(
            f"unknown method {method!r}{hint}; choose from {', '.join(shown)}, "
            f"PRESET+{CHECKPOINT}, PRESET+coded, PRESET+offload"
        )


@contextlib.contextmanager
def applied(model: nn.Module, method: Policy | str | None) -> Iterator[None]:
    """Within the context, `model` runs with `method`.

    Args:
        model: the module; its former policy comes back at the end.
        method: name of a method or a Policy; None leaves the model unchanged.

    Raises:
        ValueError: the method is unknown, or the policy does not fit the model.
        TypeError: `method` has another type.
    """
    if isinstance(method, str):
        check_method(method)
    report = report_of(model)
    report_rows = dict(report.rows) if report is not None else {}
    # `wrap` and `checkpointed` change only the `__dict__` of modules.
    saved = [(module, dict(vars(module))) for module in model.modules()]
    try:
        with contextlib.ExitStack() as stack:
            if method is not None:
                unwrap(model)
                put_on(model, method, stack)
                stack.enter_context(running(model, method))
            yield
    finally:
        for module, attributes in saved:
            vars(module).clear()
            vars(module).update(attributes)
        if report is not None:
            report.rows.clear()
            report.rows.update(report_rows)


def put_on(model: nn.Module, method: Policy | str, stack: contextlib.ExitStack) -> None:
    """Install a method on an unwrapped model.

    The policy stays installed. The checkpointing ends when `stack` closes.

    Args:
        model: the module.
        method: a Policy or the name of a method.
        stack: holds the context of the checkpointing.
    """
    policy, blocks = parts(method)
    if policy is not None:
        wrap(model, policy)
    if blocks:
        stack.enter_context(checkpointed(model, offload=method == CHECKPOINT_OFFLOAD))


def running(model: nn.Module, method: Policy | str) -> contextlib.AbstractContextManager[Any]:
    """The context for the forward and backward of a method.

    Args:
        model: the module; its device decides whether saved tensors are pinned.
        method: a Policy or the name of a method.
    """
    if method == APPROX_BP:
        return ApproxBP()
    if method == SAVE_ON_CPU:
        on_gpu = next(model.parameters()).is_cuda
        return torch.autograd.graph.save_on_cpu(pin_memory=on_gpu)
    return contextlib.nullcontext()


def parts(method: Policy | str) -> tuple[Policy | str | None, bool]:
    """Split a method into its policy and its checkpointing.

    Returns:
        (policy, name of a policy, or None; whether blocks are checkpointed).
    """
    if method in (PLAIN, CHECKPOINT, CHECKPOINT_OFFLOAD, APPROX_BP, SAVE_ON_CPU):
        return None, method in (CHECKPOINT, CHECKPOINT_OFFLOAD)
    if isinstance(method, str) and method in BOTH:
        return BOTH[method], True
    if isinstance(method, str) and method in CODED:
        return dataclasses.replace(PRESETS[CODED[method]], checkpoint_inputs=8), True
    return method, False
