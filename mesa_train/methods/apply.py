"""Methods: the ways to train a model that are measured against each other, put on and taken off.

A method is "plain", "checkpoint", "approx-bp", a preset's name, a preset's name with "+checkpoint",
"+coded" or "+offload", or a Policy.
Whatever mesa_train had installed on the model before is back afterwards, with its report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator

from torch import nn

from mesa_train.engine.wrap import report_of, unwrap, wrap
from mesa_train.policy import OFFLOADED, PRESETS, Policy

from .approx_bp import ApproxBP
from .checkpointing import checkpointed

PLAIN = "plain"
CHECKPOINT = "checkpoint"
APPROX_BP = "approx-bp"
METHODS = (PLAIN, "mesa8", "mesa4", "mesa8-recompute", "mesa4-recompute", CHECKPOINT)
# A preset whose blocks are checkpointed as well.
BOTH = {f"{preset}+{CHECKPOINT}": preset for preset in PRESETS if preset != "paper"}
# And whose blocks' inputs are 8-bit codes.
CODED = {f"{preset}+coded": preset for preset in PRESETS if preset != "paper"}


def check_method(method: str, more: tuple[str, ...] = ()) -> None:
    """ValueError with the choices and the closest name if `method` is none, nor one of `more`."""
    choices = (PLAIN, CHECKPOINT, APPROX_BP, *PRESETS, *BOTH, *CODED, *OFFLOADED, *more)
    if method not in choices:
        near = difflib.get_close_matches(method, choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        short = [c for c in choices if c not in {**BOTH, **CODED, **OFFLOADED}]
        raise ValueError(
            f"unknown method {method!r}{hint}; choose from {', '.join(short)}, "
            f"PRESET+{CHECKPOINT}, PRESET+coded, PRESET+offload"
        )


@contextlib.contextmanager
def applied(model: nn.Module, method: Policy | str | None) -> Iterator[None]:
    """Within the context `model` runs with `method`; None leaves it as it is.

    Raises ValueError for an unknown method or a policy that does not fit the model, TypeError for
    another type.
    """
    if isinstance(method, str):
        check_method(method)
    report = report_of(model)
    reported = dict(report.rows) if report is not None else {}
    # A wrapped module has another class and an attribute more: this is all that wrap changes.
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        if method is None:
            yield
            return
        unwrap(model)
        policy, blocks = parts(method)
        if policy is not None:
            wrap(model, policy)
        approximate = ApproxBP() if method == APPROX_BP else contextlib.nullcontext()
        with checkpointed(model) if blocks else approximate:
            yield
    finally:
        for module, own, attributes in before:
            module.__class__ = own
            vars(module).clear()
            vars(module).update(attributes)
        if report is not None:
            report.rows.clear()
            report.rows.update(reported)


def parts(method: Policy | str) -> tuple[Policy | str | None, bool]:
    """(the policy, its name, or None; whether blocks are checkpointed)."""
    if method in (PLAIN, CHECKPOINT, APPROX_BP):
        return None, method == CHECKPOINT
    if isinstance(method, str) and method in BOTH:
        return BOTH[method], True
    if isinstance(method, str) and method in CODED:
        return dataclasses.replace(PRESETS[CODED[method]], checkpoint_inputs=8), True
    return method, False
