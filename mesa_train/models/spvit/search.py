"""SPViT's search: gates of every attention layer and of every hidden unit, and their cost.

In train mode a gate is 0 or 1, drawn with probability sigmoid(threshold), and its gradient is the
relaxed draw's. In eval mode it is 1 if that probability is above 1/2. The three gates of an
attention layer (1x1, 3x3, attention) are multiplied up, so that a later one needs the earlier ones:

    out = g2 attention + g1 (1 - g2) conv3x3 + g0 (1 - g1) (1 - g2) conv1x1

All three branches run in every forward. The cost counts expected gates and not draws.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.models.common.straight_through import relaxed_bernoulli, straight_through

from .layers import Grid, HeadMixing, SplitAttention, mixed_convolution, on_map

INITIAL_THRESHOLD = 1.5


def gates(thresholds: Tensor, training: bool, uniform: Tensor | None = None) -> Tensor:
    """Gates of thresholds: draws in training, else 1 where the probability is above 1/2."""
    probabilities = thresholds.sigmoid()
    if training:
        return relaxed_bernoulli(probabilities, uniform)
    return (probabilities > 0.5).to(probabilities.dtype)


def expected(thresholds: Tensor) -> Tensor:
    """1 where a gate's probability p is above 1/2, with the gradient of sigmoid(p - 1/2)."""
    probabilities = thresholds.sigmoid()
    hard = (probabilities > 0.5).to(probabilities.dtype)
    return straight_through(hard, (probabilities - 0.5).sigmoid())


class SearchAttention(SplitAttention):
    """An attention layer with its two convolutions and three gates.

    Args:
        dim: width.
        num_heads: must divide `dim`.
        mixing: of the family.
        grid: (H, W) of the tokens after a class token; None if `window` is given.
        window: sides of a window (Swin); the convolutions are padded at its border.
        thresholds: name of the parameter of the gates.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mixing: HeadMixing,
        grid: Grid | None = None,
        window: Grid | None = None,
        thresholds: str = "kernel_thresholds",
    ) -> None:
        super().__init__(dim, num_heads, window)
        self.mixing, self.grid, self._name = mixing, grid, thresholds
        self.register_parameter(thresholds, nn.Parameter(torch.full((3,), INITIAL_THRESHOLD)))
        self.head_probs = nn.Parameter(torch.ones(num_heads, 9))
        self.bn_1x1 = nn.BatchNorm2d(dim // num_heads)
        self.bn_3x3 = nn.BatchNorm2d(dim // num_heads)

    @property
    def thresholds(self) -> nn.Parameter:
        """The thresholds (3) of the gates of 1x1, 3x3 and attention."""
        return self.get_parameter(self._name)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, uniform: Tensor | None = None
    ) -> Tensor:
        """Run all branches.

        Args:
            x: (B, N, dim).
            mask: of the attention in shifted windows.
            uniform: draws (3) from [0, 1) in train mode; default: drawn.
        """
        g0, g1, g2 = gates(self.thresholds, self.training, uniform).cumprod(0).unbind(0)
        one, three = self._convolve(x, 1), self._convolve(x, 3)
        return g2 * self.attend(x, mask) + g1 * (1 - g2) * three + g0 * (1 - g1) * (1 - g2) * one

    def _convolve(self, x: Tensor, side: int) -> Tensor:
        norm = self.bn_1x1 if side == 1 else self.bn_3x3

        def convolve(y: Tensor) -> Tensor:
            return mixed_convolution(y, self.v, self.proj, self.head_probs, norm, self.mixing, side)

        if self.window is None:
            return on_map(x, self.grid, convolve)
        return convolve(x.unflatten(1, self.window)).flatten(1, 2)

    def expected_kinds(self) -> Tensor:
        """Expected gates (3) of 1x1, 3x3 and attention, multiplied up."""
        return expected(self.thresholds).cumprod(0)


class SearchMlp(nn.Module):
    """Linear, GELU, Linear, with a gate for each hidden unit.

    Attributes:
        assigned_indicator_index: (hidden), the units that are on. It is set when a state dict is
            made, and never in a forward.
    """

    assigned_indicator_index: Tensor

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.ffn_thresholds = nn.Parameter(torch.full((hidden,), INITIAL_THRESHOLD))
        self.register_buffer("assigned_indicator_index", torch.ones(hidden))
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.register_state_dict_pre_hook(_set_indicators)

    def forward(self, x: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Run.

        Args:
            x: (..., dim).
            uniform: draws (hidden) from [0, 1) in train mode; default: drawn.
        """
        return self.fc2(F.gelu(self.fc1(x)) * gates(self.ffn_thresholds, self.training, uniform))

    def kept(self) -> Tensor:
        """The units that are on: bools (hidden)."""
        return self.ffn_thresholds.detach().sigmoid() > 0.5


def _set_indicators(module: Any, *_: Any) -> None:
    if not module.ffn_thresholds.is_meta:
        module.assigned_indicator_index.copy_(module.kept())


class Mlp(nn.Module):
    """Linear, GELU, Linear with `hidden` units.

    Args:
        dim: width.
        hidden: units that are kept; at least 1.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))
