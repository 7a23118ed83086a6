"""`wrap` and `unwrap`: install a policy on a model, in place, and take it off again.

`entry.py` says what a wrapped module has more than a plain one. `wrap` computes it for all modules
before it changes the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from .bound import Entry, attributes_of, entry_of, own_forward
from .entry import ATTRIBUTE, Installed
from .intercept import Report, Site
from .mirror import mirrors_for
from .ops import table
from .policy import Policy

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    model: Model,
    policy: Policy | str | None = None,
    *,
    budget: int | str | None = None,
    inputs: Any = None,
    autocast: torch.dtype | None = None,
) -> Model:
    """Let `model` keep codes instead of activations between forward and backward. In place; returns
    the model.

    model: any `nn.Module`; weights, buffers, hooks, `state_dict` keys and `forward`'s signature
        stay as they are.
    policy: a `Policy`, a preset's name, or None for "mesa8". Wrapping again replaces the policy.
    budget: instead of a policy, most memory of a training step, such as "8GiB": the policy is
        planned (see `plan`) for a batch like `inputs` under `autocast`.

    A method besides `forward` (`forward_features`, an `encode` of your own) may be called: the modules
    that it calls enter one by one. Torch functions that it calls itself are left to PyTorch, unless
    they run under `compress`, and what two of its modules could share is kept twice.

    Raises TypeError if `model` is no `nn.Module`, ValueError if an override of the policy matches
    nothing, if a budget comes without inputs or beside a policy, or if nothing fits it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"wrap takes an nn.Module, got {type(model).__name__}")
    if budget is not None:
        if policy is not None or inputs is None:
            raise ValueError(
                "wrap(budget=...) plans the policy from inputs=..., and takes no policy"
            )
        from .memory.planner import plan

        policy = plan(model, inputs, budget, autocast=autocast).policy
    elif inputs is not None or autocast is not None:
        raise ValueError("wrap takes inputs and autocast for a budget only; budget is None")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"wrap takes a model that runs in Python, got {type(model).__name__}: wrap before scripting"
        )
    resolved = Policy.of(policy)
    table.prepare()
    # All that can fail comes before the first change.
    modules = [(_plain_name(model, name), module) for name, module in _modules(model)]
    names = [plain for plain, _ in modules]
    rules, checkpointed = resolved.rules(names), resolved.checkpointed(names)
    installed = Installed(resolved)
    entries = [
        _entry(installed, Site(plain, rules[plain], module, plain in checkpointed))
        for plain, module in modules
    ]
    unwrap(model)
    for entry in entries:
        entry.put_on()
    return model


def unwrap(model: Model) -> Model:
    """Take the policy off again; the model is what it was before `wrap`. A model that is not
    wrapped stays as it is."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"unwrap takes an nn.Module, got {type(model).__name__}")
    for _, module in _modules(model):
        entry = entry_of(module)
        if entry is not None:
            entry.take_off()
        attributes_of(module).pop(ATTRIBUTE, None)
    return model


def policy_of(model: nn.Module) -> Policy | None:
    """The policy that `model` is wrapped with, or None."""
    entry = entry_of(model)
    return None if entry is None else entry.installed.policy


def report_of(model: nn.Module) -> Report | None:
    """What the last forward of a wrapped model kept, or None if it is not wrapped."""
    entry = entry_of(model)
    return None if entry is None else entry.installed.report


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forward runs in Python, with their names."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def _entry(installed: Installed, site: Site) -> Entry:
    """What is to be put on a module, with the `forward` that it has now as its own."""
    module = site.module
    assert module is not None
    before = entry_of(module)
    try:
        own = own_forward(module)
        if before is not None and mirrors_for(own) is module:
            own = before.own
        entry = Entry(installed, site, own)
        entry.prepare()
    except Exception as error:
        raise TypeError(
            f"wrap cannot enter {site.name or 'the model'} ({type(module).__name__}): {error}"
        ) from error
    return entry


# What torch.compile, checkpoint wrappers and FSDP1 put into a name.
_INSERTED = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


def _plain_name(model: nn.Module, name: str) -> str:
    """A module's name in the model itself, so that patterns and reports do not depend on who wrapped
    it before."""
    name = _INSERTED.sub("", name).lstrip(".")
    kinds = [c.__name__ for c in type(model).__mro__]
    if {"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"} & set(kinds):
        name = name.removeprefix("module").lstrip(".")
    return name
