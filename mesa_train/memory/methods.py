"""Methods: the ways to train a model that are measured against each other, put on and taken off.

A method is "plain", "checkpoint", a preset's name or a Policy. Whatever mesa_train had installed on
the model before is back afterwards, with its report.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator

from torch import nn

from mesa_train.memory.checkpointing import checkpointed
from mesa_train.policy import PRESETS, Policy
from mesa_train.wrap import report_of, unwrap, wrap

PLAIN = "plain"
CHECKPOINT = "checkpoint"
METHODS = (PLAIN, "mesa8", "mesa4", "mesa8-recompute", "mesa4-recompute", CHECKPOINT)


def check_method(method: str) -> None:
    """ValueError with the choices and the closest name if `method` is none."""
    choices = (PLAIN, CHECKPOINT, *PRESETS)
    if method not in choices:
        near = difflib.get_close_matches(method, choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(choices)}{hint}")


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
        if method == CHECKPOINT:
            with checkpointed(model):
                yield
        else:
            if method != PLAIN:
                wrap(model, method)
            yield
    finally:
        for module, own, attributes in before:
            module.__class__ = own
            vars(module).clear()
            vars(module).update(attributes)
        if report is not None:
            report.rows.clear()
            report.rows.update(reported)
