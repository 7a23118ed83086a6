"""SPViT's layers (arXiv 2111.11802): attention, or a convolution made of its own weights.

A convolution takes the place of an attention layer of H heads of width d. Each of the 9 positions k
of a 3x3 kernel has weights p[h, k] over the heads, a softmax of `head_probs / alpha`. With the
values' weights V_h and the projection's O_h of head h,

    tap k of the kernel = sum_h p[h, k] V_h       bias = sum_k sum_h p[h, k] (bias of V_h)
    output = ReLU(BN(kernel * x + bias)) @ sum_k sum_h p[h, k] O_h^T + (bias of O)

A 1x1 convolution takes the centre alone. So a network keeps the attention's full weights and forms
the small kernels in each forward; `folding.py` replaces them after the training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn

Grid = tuple[int, int]
# The four choices of an attention layer: [1x1, 3x3, attention] are on.
ATTENTION, CONV3, CONV1, SKIP = (1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)
KINDS = (ATTENTION, CONV3, CONV1, SKIP)


@dataclasses.dataclass(frozen=True)
class HeadMixing:
    """How a family mixes heads into kernels.

    Args:
        alpha: temperature of the softmax over heads.
        columns: for each position of the kernel in column-major order, its column of `head_probs`.
    """

    alpha: float
    columns: tuple[int, ...]

    @property
    def centre(self) -> int:
        """The column of the kernel's centre."""
        return self.columns[4]

    @property
    def rows(self) -> list[int]:
        """The columns of `head_probs` in the row-major order of a kernel."""
        return [self.columns[y + 3 * x] for y in range(3) for x in range(3)]


def mixed_kernels(
    v: nn.Linear, proj: nn.Linear, head_probs: Tensor, mixing: HeadMixing, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel (d, C, side, side), its bias (d) and the output weights (C, d) of a convolution."""
    heads, dim = head_probs.shape[0], v.weight.shape[1]
    p = (head_probs / mixing.alpha).softmax(0)
    p = p[:, [mixing.centre]] if side == 1 else p[:, mixing.rows]
    values = v.weight.view(heads, -1)
    kernel = (p.t() @ values).view(side, side, -1, dim).permute(2, 3, 0, 1)
    per_head = p.sum(1)  # a sum of nine averages, not their mean
    bias = per_head @ v.bias.view(heads, -1)
    out = torch.einsum("h,chd->cd", per_head, proj.weight.unflatten(1, (heads, -1)))
    return kernel, bias, out


def mixed_convolution(
    x: Tensor,
    v: nn.Linear,
    proj: nn.Linear,
    head_probs: Tensor,
    norm: nn.Module,
    mixing: HeadMixing,
    side: int,
) -> Tensor:
    """The convolution of a map (B, H, W, C), zero padded, to the same shape."""
    kernel, bias, out = mixed_kernels(v, proj, head_probs, mixing, side)
    y = F.conv2d(x.permute(0, 3, 1, 2), kernel, bias, padding=side // 2)
    return F.linear(F.relu(norm(y)).permute(0, 2, 3, 1), out, proj.bias)


def on_map(x: Tensor, grid: Grid | None, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of maps (B, H, W, C).

    Args:
        x: a map (B, H, W, C); with `grid`, tokens (B, 1 + H * W, C), whose class token passes
            unchanged.
        grid: (H, W) of the tokens; None for maps.
        function: from a map to a map of the same shape.
    """
    if grid is None:
        return function(x)
    return torch.cat([x[:, :1], function(x[:, 1:].unflatten(1, grid)).flatten(1, 2)], dim=1)


class SplitAttention(nn.Module):
    """Softmax attention of (B, N, dim), with the projection of q and k apart from that of v.

    Args:
        dim: width.
        num_heads: must divide `dim`.
        window: sides (H, W) of a window whose tokens have learned relative biases; None (default)
            for no biases.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: Grid | None = None) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        if window is not None:
            rows = (2 * window[0] - 1) * (2 * window[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
            trunc_normal_(self.relative_position_bias_table, std=0.02)
            self.register_buffer("relative_position_index", get_relative_position_index(*window))
        self.qk = nn.Linear(dim, 2 * dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, N, dim); B is a multiple of the windows of `mask`.
            mask: (windows, N, N), added to the logits; default: none.
        """
        batch, tokens, dim = x.shape
        qk = self.qk(x).view(batch, tokens, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = qk.unbind(0)
        v = self.v(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        bias = self._bias(batch, mask)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if bias is None else bias.to(q.dtype)
        )
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attend(x, mask)

    def _bias(self, batch: int, mask: Tensor | None) -> Tensor | None:
        """(1 or batch, heads, N, N)."""
        if self.window is None:
            return None
        tokens = self.window[0] * self.window[1]
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(tokens, tokens, -1).permute(2, 0, 1).unsqueeze(0)
        if mask is None:
            return bias
        return (bias + mask.unsqueeze(1)).repeat(batch // len(mask), 1, 1, 1)


class MixedConv(nn.Module):
    """A convolution of a fixed side in the place of an attention layer.

    Args:
        dim: width.
        num_heads: of the attention.
        side: 1 or 3.
        mixing: of the family.
        grid: (H, W) of the tokens after a class token; None for maps.
    """

    def __init__(
        self, dim: int, num_heads: int, side: int, mixing: HeadMixing, grid: Grid | None
    ) -> None:
        super().__init__()
        self.side, self.mixing, self.grid = side, mixing, grid
        self.head_probs = nn.Parameter(torch.ones(num_heads, 9))
        self.add_module(f"bn_{side}x{side}", nn.BatchNorm2d(dim // num_heads))
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    @property
    def norm(self) -> nn.Module:
        """The batch norm."""
        return self.get_submodule(f"bn_{self.side}x{self.side}")

    def forward(self, x: Tensor) -> Tensor:
        def convolve(y: Tensor) -> Tensor:
            return mixed_convolution(
                y, self.v, self.proj, self.head_probs, self.norm, self.mixing, self.side
            )

        return on_map(x, self.grid, convolve)


class FoldedConv(nn.Module):
    """A convolution with its own small kernels: convolution, batch norm, ReLU, 1x1 convolution.

    Args:
        dim: width.
        head_dim: width between the convolutions.
        side: 1 or 3.
        grid: (H, W) of the tokens after a class token; None for maps.
    """

    def __init__(self, dim: int, head_dim: int, side: int, grid: Grid | None) -> None:
        super().__init__()
        self.grid = grid
        self.bconv = nn.Sequential(
            nn.Conv2d(dim, head_dim, side, padding=side // 2),
            nn.BatchNorm2d(head_dim),
            nn.ReLU(),
            nn.Conv2d(head_dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return on_map(x, self.grid, lambda y: self.bconv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Skip(nn.Module):
    """The input itself. The block then adds its normalised input, as in the authors' networks."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def make_layer(
    kind: tuple[int, ...],
    dim: int,
    num_heads: int,
    mixing: HeadMixing,
    *,
    grid: Grid | None = None,
    window: Grid | None = None,
    folded: bool = False,
) -> nn.Module:
    """The layer of one of `KINDS`."""
    if kind == ATTENTION:
        return SplitAttention(dim, num_heads, window)
    if kind == SKIP:
        return Skip()
    side = 3 if kind == CONV3 else 1
    if folded:
        return FoldedConv(dim, dim // num_heads, side, grid)
    return MixedConv(dim, num_heads, side, mixing, grid)
