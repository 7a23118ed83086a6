"""Early signs of divergence in a large ViT, measured at low cost.

Without norms on queries and keys, models of several billion parameters diverge: attention logits
grow until softmax is one-hot and its entropy is zero (arXiv 2302.05442). `AttentionWatch` records
the largest logit and the mean entropy of every block, on one image, at a fixed interval of steps.
`Guard` names the first block whose output is not finite. Both copy no value to the host during a
step, and do not change the computation.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class DivergenceError(RuntimeError):
    """The run diverged. The message names the step and the first block."""


class AttentionWatch:
    """Largest attention logit and mean entropy of every block.

    The entropy is in nats: log N if attention is uniform. A measurement costs the scores of one
    image: N^2 D products a block, 1/B of the attention's own. Under tensor parallelism, each rank
    measures its own heads.

    Args:
        model: with `blocks`.
        every: steps between two measurements; default 100; 0: never.
    """

    def __init__(self, model: Any, every: int = 100) -> None:
        self.blocks, self.every = model.blocks, every
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context manager around the forward of step `number`."""
        self.found = {}
        if not self.every or number % self.every:
            yield
            return
        hooks = []
        for index, block in enumerate(self.blocks):
            seen: dict[str, Tensor] = {}
            hooks += [
                block.q_norm.register_forward_hook(self._keep(index, "q", seen)),
                block.k_norm.register_forward_hook(self._keep(index, "k", seen)),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def row(self) -> dict[str, list[float]]:
        """The last measurement by name, one number a block; {} without a measurement.

        Returns:
            {"logit_max": [...], "entropy": [...]}.
        """
        if not self.found:
            return {}
        looked = [self.found[i] for i in sorted(self.found)]
        return {
            "logit_max": [maximum.item() for maximum, _ in looked],
            "entropy": [entropy.item() for _, entropy in looked],
        }

    def _keep(self, index: int, which: str, seen: dict[str, Tensor]) -> Any:
        """A hook that stores the queries or keys of a block, and measures once both are there."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG001
            # The recompute of a checkpoint runs the hook again; the first measurement stays.
            if index in self.found:
                return
            seen[which] = output.detach()[0]  # (N, heads, head_dim)
            if len(seen) == 2:
                self.found[index] = attention_statistics(seen.pop("q"), seen.pop("k"))

        return hook


@torch.no_grad()
def attention_statistics(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(largest absolute logit, mean entropy) of q, k (N, heads, head_dim), in float32."""
    q, k = q.float().transpose(0, 1), k.float().transpose(0, 1)
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).nan_to_num(0.0).sum(-1).mean()
    return logits.abs().amax(), entropy


class Guard:
    """Raise DivergenceError at the first loss or gradient norm over `limit` or not finite.

    The message names the first block, in the order of the forward, whose output is not finite. If
    all outputs are finite, it names the block whose output grew most over its input.

    Args:
        model: with `blocks`.
        limit: default 1e6.
    """

    def __init__(self, model: Any, limit: float = 1e6) -> None:
        self.blocks, self.limit = model.blocks, limit
        self.number = 0
        self.sizes: list[Tensor] = []

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context manager around the forward of step `number`.

        It records the largest value of one image after each block.
        """
        self.number, self.sizes = number, []
        hooks = [block.register_forward_hook(self._keep) for block in self.blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG002
        """A hook that stores the largest value of one image."""
        if len(self.sizes) < len(self.blocks):
            with torch.no_grad():
                self.sizes.append(output.detach()[0].abs().amax())

    def check(self, loss: float, norm: float = 0.0) -> None:
        """Raise DivergenceError if the step diverged. Every rank must call this."""
        bad = [
            f"{what} is {value:g}"
            for what, value in (("the loss", loss), ("the gradient norm", norm))
            if not math.isfinite(value) or abs(value) > self.limit
        ]
        if not bad:
            return
        rank = f" on rank {dist.get_rank()}" if dist.is_initialized() else ""
        raise DivergenceError(f"step {self.number + 1}{rank}: {', '.join(bad)}; {self.blame()}")

    def blame(self) -> str:
        """Text that names the block at which the divergence began."""
        sizes = [size.item() for size in self.sizes]
        for index, size in enumerate(sizes):
            if not math.isfinite(size):
                before = f", {sizes[index - 1]:g} before it" if index else ""
                return f"blocks.{index} is the first whose output is not finite{before}"
        if not sizes:
            return "no forward was watched"
        growth = [b / max(a, 1e-30) for a, b in itertools.pairwise(sizes)]
        if not growth:
            return f"blocks.0 reached {sizes[0]:g}"
        worst = max(range(len(growth)), key=growth.__getitem__) + 1
        return f"all outputs are finite; blocks.{worst} grew most, to {sizes[worst]:g}"
