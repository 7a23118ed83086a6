"""`wrap` with a policy or with a memory budget: the one place above both the engine and the planner."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .engine.wrap import Model
from .engine.wrap import unwrap as unwrap
from .engine.wrap import wrap as wrap_with_policy
from .policy import Policy


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
        from .planner.planner import plan

        policy = plan(model, inputs, budget, autocast=autocast).policy
    elif inputs is not None or autocast is not None:
        raise ValueError("wrap takes inputs and autocast for a budget only; budget is None")
    return wrap_with_policy(model, policy)
