"""`wrap` with a policy or a memory budget.

This is the one module above both the engine and the planner. `engine/wrap.py` installs a policy;
this module also makes a policy from a budget.
"""

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
    """Make `model` save codes instead of activations for the backward. Works in place.

    Weights, buffers, hooks, `state_dict` keys and the signature of `forward` stay as they are. A
    second `wrap` replaces the policy.

    The user may call a method other than `forward`, such as `forward_features` or an own `encode`.
    The modules that this method calls use the policy one by one. Torch functions that the method
    calls directly are left to PyTorch, unless they run under `compress`. A tensor that two of these
    modules could share is then saved twice.

    Args:
        model: any `nn.Module`.
        policy: a `Policy`, a preset's name, or None for "mesa8".
        budget: used instead of a policy: the largest memory of a training step, in bytes or as text
            such as "8GiB". The policy is planned (see `plan`).
        inputs: with a budget, an example batch, as for `plan`.
        autocast: with a budget, the dtype of autocast; default: no autocast.
    Returns:
        `model`.
    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: an override of the policy matches nothing; a budget comes without inputs or with
            a policy; no policy fits the budget.
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
