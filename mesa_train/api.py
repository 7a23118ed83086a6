"""`wrap` with a policy or a memory budget, and `plan`.

These are the functions above both the engine and the planner. `engine/wrap.py` installs a policy;
`wrap` here also makes a policy from a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .engine.wrap import Model
from .engine.wrap import unwrap as unwrap
from .engine.wrap import wrap as wrap_with_policy
from .policy import Policy
from .utils.formatting import parse_bytes

if TYPE_CHECKING:
    from .planner.plan import Plan


def wrap(
    model: Model,
    policy: Policy | str | None = None,
    *,
    budget: int | str | None = None,
    inputs: Any = None,
    more_inputs: Sequence[Any] = (),
    autocast: torch.dtype | None = None,
    refine_steps: int = 3,
) -> Model:
    """Make `model` save codes instead of activations for the backward. Works in place.

    Weights, buffers, hooks, `state_dict` keys and the signature of `forward` stay as they are. A
    second `wrap` replaces the policy.

    If the user calls another method than `forward`, such as `forward_features`, each module that
    the method calls applies the policy by itself. Torch functions that the method calls directly
    are left to PyTorch, unless they run under `compress`. A tensor that two modules could share is
    then saved twice.

    Args:
        model: any `nn.Module`.
        policy: a `Policy`, a preset's name, or None for "mesa8".
        budget: used instead of a policy: the largest memory of a training step, in bytes or as text
            such as "8GiB". The policy is planned (see `plan`).
        inputs: with a budget, an example batch, as for `plan`.
        more_inputs: with a budget, batches of other shapes, as for `plan`.
        autocast: with a budget, the dtype of autocast; default: no autocast.
        refine_steps: with a budget, number of first steps whose real peaks are compared with it. If
            a step takes more, the model is wrapped with a plan for less. GPUs only; default 3.
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
                "wrap(budget=...) plans the policy itself: give inputs=... and no policy"
            )
        if refine_steps < 0:
            raise ValueError(f"refine_steps must be at least 0, got {refine_steps}")
        return _wrap_for_budget(model, [inputs, *more_inputs], budget, autocast, refine_steps)
    if inputs is not None or autocast is not None or more_inputs:
        raise ValueError(
            "wrap takes inputs, more_inputs and autocast only with a budget; budget is None"
        )
    return wrap_with_policy(model, policy)


def _wrap_for_budget(
    model: Model, batches: list[Any], budget: int | str, autocast: torch.dtype | None, steps: int
) -> Model:
    """Plan a policy, install it, and compare the first steps on a GPU with the budget."""
    from .planner.refine import PeakWatch, cuda_peak
    from .planner.shapes import ShapePlanner

    planner = ShapePlanner(model, batches, autocast=autocast)
    wrap_with_policy(model, planner.plan(budget).policy)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda" and steps:
        limit = parse_bytes(budget) if isinstance(budget, str) else budget
        PeakWatch(model, planner, limit, steps, cuda_peak(device))
    return model


def plan(
    model: nn.Module,
    inputs: Any,
    budget: int | str | None = None,
    *,
    more_inputs: Sequence[Any] = (),
    max_time: float | None = None,
    max_error: float | None = None,
    autocast: torch.dtype | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer_bytes: int | None = None,
    cpu_memory: int | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Plan:
    """Find the policy that fits `budget` with the least time and gradient error.

    The model does not change.

    Args:
        model: the module to plan for. For a model on the meta device the plan is only counted: its
            bytes are exact, its time and error are the values of a typical GPU and ViT.
        inputs: as for `footprint`.
        budget: most bytes allocated at once in a training step, such as "8GiB"; None for the
            smallest peak that the other bounds allow.
        more_inputs: batches of other shapes, such as other image sizes or numbers of tokens. The
            plan is for the batch with the largest peak, and its peak bounds the others.
        max_time: most step time, as a multiple of the plain step's time (1.1: 10 % more); None for
            no bound.
        max_error: most relative error of the gradient that codes may add to plain's error; None for
            no bound.
        autocast: as for `footprint`.
        loss: from the output to a scalar; default: `default_loss`.
        optimizer_bytes: bytes of the optimizer's states; default: AdamW's for the trained
            parameters.
        cpu_memory: most CPU memory for offloaded stashes, such as "64GiB"; None for no bound.
            Nothing is offloaded if the model is on a CPU.
        progress: called with (step, its number from 0, number of steps).

    Returns:
        A `Plan`.

    Raises:
        OverBudget: no policy fits; its message has the smallest possible peak.
        ValueError: a bound is out of range, or `footprint` raises it.
        TypeError: `footprint` raises it.
        ImportError: highspy is missing; the message names the extra.
    """
    from .planner.shapes import ShapePlanner

    planner = ShapePlanner(
        model,
        [inputs, *more_inputs],
        autocast=autocast,
        loss=loss,
        optimizer_bytes=optimizer_bytes,
        cpu_memory=cpu_memory,
        progress=progress,
    )
    return planner.plan(budget, max_time=max_time, max_error=max_error)
