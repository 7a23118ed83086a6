"""`wrap` and `unwrap`: install a policy on a model, in place, and take it off again.

Each module's class is exchanged for a subclass of the same name whose `forward` enters the
interception if it is not on already. Nothing else changes: the same Parameters, buffers, hooks,
state_dict keys, signature and attributes. That every module can enter is what lets a checkpoint's
recompute, which runs a block on its own in the backward, meet the same policy. Where no gradient
will be needed, nothing is entered and nothing kept.
"""

from __future__ import annotations

import copyreg
import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import nn

from . import sharded
from .intercept import Interception, Report, Site, active, hookable, saved_hooks
from .ops import table
from .ops.checkpoint_inputs import InputHooks
from .policy import Policy
from .stash import Lineage
from .steps import Steps

Model = TypeVar("Model", bound=nn.Module)

# The one attribute a wrapped module has more than a plain one.
_ATTRIBUTE = "_mesa_train"


class Installed:
    """What all modules of one wrapped model share: the policy and the report of the last
    forward."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.report = Report()
        self.steps = Steps()
        changes = [policy.ranges, *[o.get("ranges") for o in policy.overrides.values()]]
        self._running = "running" in changes

    def forward_begins(self, model: nn.Module) -> None:
        """A new forward of the whole model: clear the report, and see whether the weights have
        moved."""
        self.report.rows.clear()
        if self._running:
            self.steps.look(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "report": Report()}


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
    resolved = Policy.of(policy)
    table.link()
    modules = [(_plain_name(model, name), module) for name, module in model.named_modules()]
    names = [plain for plain, _ in modules]
    rules, checkpointed = resolved.rules(names), resolved.checkpointed(names)
    unwrap(model)
    installed = Installed(resolved)
    for plain, module in modules:
        module.__class__ = _wrapped(type(module))  # type: ignore[arg-type]
        module.__dict__[_ATTRIBUTE] = (
            installed,
            Site(plain, rules[plain], module, plain in checkpointed),
        )
    return model


def unwrap(model: Model) -> Model:
    """Take the policy off again; the model is what it was before `wrap`. A model that is not
    wrapped stays as it is."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"unwrap takes an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
        for name in [n for n in module._buffers if n.startswith(_ATTRIBUTE + "_")]:
            del module._buffers[name]
            module._non_persistent_buffers_set.discard(name)
        if "_mesa_train_plain" in type(module).__dict__:
            module.__class__ = type(module).__dict__["_mesa_train_plain"]
    return model


def policy_of(model: nn.Module) -> Policy | None:
    """The policy that `model` is wrapped with, or None."""
    entry = model.__dict__.get(_ATTRIBUTE)
    return None if entry is None else entry[0].policy


def report_of(model: nn.Module) -> Report | None:
    """What the last forward of a wrapped model kept, or None if it is not wrapped."""
    entry = model.__dict__.get(_ATTRIBUTE)
    return None if entry is None else entry[0].report


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


@functools.cache
def _wrapped(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class that enters the interception; one per class, however many
    models."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        entry = self.__dict__.get(_ATTRIBUTE)
        if entry is None or not torch.is_grad_enabled():
            return plain.forward(self, *args, **kwargs)
        if entry[1].checkpointed:
            return _checkpointed(functools.partial(intercepted, self), entry, args, kwargs)
        return intercepted(self, *args, **kwargs)

    def intercepted(self: Any, *args: Any, **kwargs: Any) -> Any:
        installed, site = self.__dict__[_ATTRIBUTE]
        mode = active(installed)
        if mode is None:
            if site.name == "" and not torch.compiler.is_compiling():
                installed.forward_begins(self)
            with Interception(site, installed, installed.report, installed.steps.count):
                return plain.forward(self, *args, **kwargs)
        outside, mode.site = mode.site, site
        scope, hooks = (mode.hooks, mode.lineage, mode.linears), saved_hooks()
        apart = hooks is not mode.hooks or (
            not torch.compiler.is_compiling() and sharded.unit(type(self))  # type: ignore[arg-type]
        )
        if apart:
            # A checkpoint began since, or parameters inside are freed apart from those outside. What
            # is kept inside must not depend on what was kept outside.
            mode.hooks, mode.lineage, mode.linears = hooks, Lineage(mode.relays), Lineage()
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            mode.site = outside
            if apart:
                mode.hooks, mode.lineage, mode.linears = scope

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = plain.__reduce_ex__(self, protocol)
        if reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_new, (plain, *reduced[1][1:]), *reduced[2:])
        return reduced

    members = {"forward": forward, "__reduce_ex__": __reduce_ex__, "_mesa_train_plain": plain}
    members["__module__"], members["__qualname__"] = plain.__module__, plain.__qualname__
    members["__doc__"] = plain.__doc__
    return type(plain.__name__, (plain,), members)


def _checkpointed(
    forward: Callable[..., Any], entry: tuple[Installed, Site], args: Any, kwargs: Any
) -> Any:
    """A module's forward that keeps its inputs alone, and runs again in the backward."""
    installed, site = entry
    mode = active(installed)
    run = functools.partial(
        torch.utils.checkpoint.checkpoint, forward, *args, use_reentrant=False, **kwargs
    )
    if mode is None:
        # The model itself, or a module called by itself.
        if site.name == "" and not torch.compiler.is_compiling():
            assert site.module is not None
            installed.forward_begins(site.module)
        with Interception(site, installed, installed.report, installed.steps.count):
            return run()
    outside, mode.site = mode.site, site
    try:
        # Inside the hooks of a checkpoint of the user's own, this one's inputs are not kept at all.
        if mode.inputs is None and site.rules.operators["checkpoint"] and hookable():
            with InputHooks(mode):
                return run()
        return run()
    finally:
        mode.site = outside


def _new(plain: type[nn.Module], *args: Any) -> nn.Module:
    """Unpickling: an object of the wrapped class of `plain`, its state still to come."""
    wrapped = _wrapped(plain)  # type: ignore[arg-type]
    return wrapped.__new__(wrapped, *args)
