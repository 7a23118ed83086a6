"""`wrap` and `unwrap`: install a policy on a model in place, and remove it.

`bound.py` describes the entry that `wrap` gives each module. `wrap` computes the entries of all
modules before it changes the first module, so an error leaves the model unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from mesa_train.policy import Policy
from mesa_train.stash.context import ModuleContext, Report

from . import native
from .bound import Entry, attributes_of, entry_of, own_forward
from .entry import ATTRIBUTE, Installed
from .intercept import CompressionMode
from .mirror import mirrors_for
from .roles import of_roles

Model = TypeVar("Model", bound=nn.Module)


def wrap(model: Model, policy: Policy | str | None = None) -> Model:
    """Install a policy on a model, in place.

    `mesa_train.wrap` (`api.py`) documents the arguments.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"wrap takes an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"wrap takes a model that runs in Python, got {type(model).__name__}: wrap before scripting"
        )
    resolved = Policy.of(policy)
    native.prepare(CompressionMode)
    # All steps that can fail come before the first change.
    modules = [(_plain_name(model, name), module) for name, module in _modules(model)]
    names = [plain for plain, _ in modules]
    rules = resolved.rules(names, of_roles(modules))
    checkpointed = resolved.checkpointed(names)
    installed = Installed(resolved)
    entries = [
        _entry(installed, ModuleContext(plain, rules[plain], module, plain in checkpointed))
        for plain, module in modules
    ]
    unwrap(model)
    for entry in entries:
        entry.put_on()
    return model


def unwrap(model: Model) -> Model:
    """Remove the policy from a model, in place.

    The model is then as it was before `wrap`. A model that is not wrapped stays unchanged.

    Args:
        model: a wrapped or a plain model.
    Returns:
        `model`.
    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unwrap takes an nn.Module, got {type(model).__name__}")
    for _, module in _modules(model):
        entry = entry_of(module)
        if entry is not None:
            entry.take_off()
        attributes_of(module).pop(ATTRIBUTE, None)
    return model


def policy_of(model: nn.Module) -> Policy | None:
    """The policy that `model` is wrapped with, or None if it is not wrapped."""
    entry = entry_of(model)
    return None if entry is None else entry.installed.policy


def report_of(model: nn.Module) -> Report | None:
    """The report of a wrapped model's last forward, or None if the model is not wrapped."""
    entry = entry_of(model)
    return None if entry is None else entry.installed.report


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose forward runs in Python, with their names."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def _entry(installed: Installed, context: ModuleContext) -> Entry:
    """The entry of a module, which holds the module's present `forward` as its own."""
    module = context.module
    assert module is not None
    before = entry_of(module)
    try:
        own = own_forward(module)
        if before is not None and mirrors_for(own) is module:
            own = before.own
        entry = Entry(installed, context, own)
        entry.prepare()
    except Exception as error:
        raise TypeError(
            f"wrap cannot enter {context.name or 'the model'} ({type(module).__name__}): {error}"
        ) from error
    return entry


# Parts that torch.compile, checkpoint wrappers and FSDP1 insert into a name.
_INSERTED = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


def _plain_name(model: nn.Module, name: str) -> str:
    """A module's name in the model itself.

    Patterns and reports then do not depend on other wrappers around the model.
    """
    name = _INSERTED.sub("", name).lstrip(".")
    kinds = [c.__name__ for c in type(model).__mro__]
    if {"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"} & set(kinds):
        name = name.removeprefix("module").lstrip(".")
    return name
