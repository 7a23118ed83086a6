"""Optimizers and schedules of MoCo v3: AdamW in one group, LARS, and two functions of the epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def learning_rate(epoch: float, *, peak: float, warmup: float, epochs: float) -> float:
    """The learning rate at a fractional epoch: a linear rise from 0, then half a cosine to 0.

    Args:
        epoch: from 0.
        peak: the base rate times batch / 256.
        warmup: epochs of the rise.
        epochs: of the run.
    Returns:
        The rate. From the end of the run on it is 0.
    Raises:
        ValueError: `warmup` is negative, or the run is not longer than the warm-up.
    """
    if not 0 <= warmup < epochs:
        raise ValueError(
            f"warmup must be at least 0 and below epochs, got warmup={warmup:g}, epochs={epochs:g}"
        )
    if epoch < warmup:
        return peak * epoch / warmup
    if epoch >= epochs:
        return 0.0
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def momentum(epoch: float, *, base: float, epochs: float, cosine: bool = True) -> float:
    """The momentum of the momentum encoder at a fractional epoch: from `base` to 1 by a cosine.

    Args:
        epoch: from 0.
        base: at the start; 0.99, and 0.996 for ResNet-50 over 1000 epochs.
        epochs: of the run.
        cosine: false keeps `base`.
    """
    if not cosine:
        return base
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW in one group: biases, norms and the class token decay too, as in the authors' runs.

    Parameters without a gradient (positions, frozen projection, momentum encoder) are left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay
    )


class LARS(Optimizer):
    """SGD with layer-wise rates, as in the authors' ResNet-50 runs (arXiv 1708.03888).

    For a tensor p with more than one dimension: g = grad + weight_decay * p, then
    g *= trust * |p| / |g| (unless a norm is 0), then mu = momentum * mu + g and p -= lr * mu. A
    tensor of one dimension has no decay and no trust ratio. There is no Nesterov and no epsilon;
    timm's Lars takes the trust ratio before the decay.

    Args:
        params: parameters or groups.
        lr: learning rate; not negative.
        weight_decay: default 0.
        momentum: default 0.9.
        trust: the trust coefficient; default 0.001.
    Raises:
        ValueError: a value is negative.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        given = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        for name, value in given.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        super().__init__(params, given)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. Parameters without a gradient stay, and so does their momentum."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if p.dim() > 1:
            grad = grad.add(p, alpha=group["weight_decay"])
            size, length = p.norm(), grad.norm()
            ratio = group["trust"] * size / length
            # Compared on the device: reading the norms would wait for it.
            grad = grad * torch.where((size > 0) & (length > 0), ratio, torch.ones_like(ratio))
        state = self.state[p]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(p)
        state["mu"].mul_(group["momentum"]).add_(grad)
        p.add_(state["mu"], alpha=-group["lr"])
