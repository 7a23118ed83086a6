"""Accelerate integration: one call after `Accelerator(...)`, or one field of a recipe's YAML.

    accelerator = mesa_train.integrations.accelerate.enable(Accelerator(), config["mesa_train"])
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Without this call, `accelerator.prepare(mesa_train.wrap(model))` and
`mesa_train.wrap(accelerator.prepare(model))` have the same effect, under DDP, FSDP2 and DeepSpeed
alike.

`capture_step` here is `mesa_train.capture_step` for objects that Accelerate prepared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from mesa_train.engine.wrap import wrap
from mesa_train.graphs.checks import CaptureError
from mesa_train.graphs.step import CapturedStep
from mesa_train.graphs.step import capture_step as capture_any

from .setting import Setting, policy_of_setting

AnyAccelerator = TypeVar("AnyAccelerator")


def enable(accelerator: AnyAccelerator, policy: Setting = True) -> AnyAccelerator:
    """Make `accelerator.prepare` wrap every model with mesa_train first.

    A second call replaces the policy.

    Args:
        accelerator: an `accelerate.Accelerator`.
        policy: a `Policy`, the name of a preset, or a value of a YAML file. True (default) is the
            default policy. A mapping has fields of `Policy`, and may have `preset`, the preset to
            start from. With False or None models are not wrapped.
    Returns:
        The accelerator.
    Raises:
        ValueError: the policy is wrong.
        TypeError: the policy has a wrong type, or `accelerator` is not an Accelerator.
    """
    if not callable(getattr(accelerator, "prepare", None)):
        raise TypeError(f"accelerator must be an Accelerator, got {type(accelerator).__name__}")
    resolved = policy_of_setting(policy)
    vars(accelerator).pop("prepare", None)
    if resolved is None:
        return accelerator
    prepare = accelerator.prepare  # type: ignore[attr-defined]

    @functools.wraps(prepare)
    def prepare_wrapped(*objects: Any, **kwargs: Any) -> Any:
        for item in objects:
            if isinstance(item, nn.Module):
                wrap(item, resolved)
        return prepare(*objects, **kwargs)

    accelerator.prepare = prepare_wrapped  # type: ignore[attr-defined]
    return accelerator


def capture_step(
    accelerator: Any,
    model: nn.Module,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Any = None,
    **options: Any,
) -> CapturedStep:
    """`mesa_train.capture_step` for a model and an optimizer that Accelerate prepared.

    The step replaces `accelerator.accumulate`, `backward`, `clip_grad_norm_`, `optimizer.step` and
    `zero_grad`. The mixed precision, the scaler and the gradient accumulation are the
    accelerator's. Prepared data loaders and schedulers work as before; a scheduler steps after each
    call with `step.completed`.

    Args:
        accelerator: an `accelerate.Accelerator` with one process, or with DDP.
        model: from `accelerator.prepare`.
        loss: as for `mesa_train.capture_step`. It runs outside of the mixed precision, as in
            Accelerate's own loop.
        optimizer: from `accelerator.prepare`; default: none.
        options: `clip_norm`, `optimizer_in_graph`, `warmup` and `max_graphs`, as for
            `mesa_train.capture_step`.
    Returns:
        The step.
    Raises:
        CaptureError: FSDP, DeepSpeed or another parallelism is in use, or
            `mesa_train.capture_step` raises it.
        TypeError, ValueError: as `mesa_train.capture_step` raises them.
    """
    used = str(accelerator.distributed_type).rpartition(".")[2]
    if used not in ("NO", "MULTI_GPU"):
        raise CaptureError(f"Accelerate uses {used}; use one GPU or DDP")
    # Accelerate's autocast is inside of the model's forward. Its cache of weights begins and ends
    # there, so the cache is captured as a whole.
    return capture_any(
        model,
        loss,
        getattr(optimizer, "optimizer", optimizer),
        scaler=accelerator.scaler,
        accumulate=accelerator.gradient_accumulation_steps,
        **options,
    )
