"""Swin's windows and stages, with the authors' names: merging ends a stage (timm: it begins one)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models.swin_transformer import PatchMerging, window_partition, window_reverse
from torch import Tensor, nn

from mesa_train.models.lit.pyramid import PatchEmbed

from .classifier import drop_path_rates

Grid = tuple[int, int]
# From (stage, number in the stage, width, heads, grid, window, shift, drop path rate) to a block.
MakeBlock = Callable[[int, int, int, int, Grid, Grid, int, float], nn.Module]


def shift_mask(grid: Grid, window: Grid, shift: int) -> Tensor:
    """The mask (windows, N, N) of shifted windows: -100 between tokens that are no neighbours."""
    regions = torch.zeros(1, *grid, 1)
    count = 0
    cuts = [(slice(0, -side), slice(-side, -shift), slice(-shift, None)) for side in window]
    for rows in cuts[0]:
        for columns in cuts[1]:
            regions[:, rows, columns] = count
            count += 1
    tokens = window_partition(regions, window).flatten(1)
    same = tokens.unsqueeze(1) == tokens.unsqueeze(2)
    return torch.where(same, 0.0, -100.0)


def in_windows(x: Tensor, window: Grid, shift: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of windows (B * windows, N, C) to a map (B, H, W, C), rolled by `shift`."""
    height, width = x.shape[1:3]
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    out = function(window_partition(x, window).flatten(1, 2))
    x = window_reverse(out.unflatten(1, window), window, height, width)
    return x.roll((shift, shift), (1, 2)) if shift else x


class SwinStage(nn.Module):
    """The blocks of a stage, and the merging after them. The last stage has no merging.

    Args:
        dim: width of the blocks.
        blocks: of maps (B, H, W, dim).
        merges: whether a merging to (B, H / 2, W / 2, 2 * dim) follows.
    """

    def __init__(self, dim: int, blocks: Sequence[nn.Module], merges: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = PatchMerging(dim) if merges else None

    def merge(self, x: Tensor) -> Tensor:
        """Run the merging, if there is one."""
        return x if self.downsample is None else self.downsample(x)


def add_stages(
    model: Any,
    name: str,
    make_block: MakeBlock,
    *,
    img_size: int | tuple[int, int],
    in_chans: int,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int,
    drop_path_rate: float,
) -> None:
    """Give a model `img_size`, `grids`, `widths`, `patch_embed`, `layers` and `norm`.

    Raises:
        ValueError: `name` leads the message; a stage's map is no multiple of its window.
    """
    if len(depths) != len(num_heads):
        raise ValueError(
            f"{name}: depths and num_heads must have one length, got {len(depths)} and {len(num_heads)}"
        )
    model.img_size = to_2tuple(img_size)
    model.grids = [
        (model.img_size[0] // 4 // 2**stage, model.img_size[1] // 4 // 2**stage)
        for stage in range(len(depths))
    ]
    model.widths = [embed_dim * 2**stage for stage in range(len(depths))]
    model.patch_embed = PatchEmbed(in_chans, embed_dim)
    rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
    unit = 4 * 2 ** (len(depths) - 1)
    stages = []
    for stage, (dim, grid, heads) in enumerate(
        zip(model.widths, model.grids, num_heads, strict=True)
    ):
        side = min(window_size, *grid)
        if not side or any(n % side for n in grid) or any(n % unit for n in model.img_size):
            raise ValueError(
                f"{name}: img_size must give maps that are multiples of the window {window_size}, got "
                f"{model.img_size[0]}x{model.img_size[1]}"
            )
        shift = side // 2 if min(grid) > window_size else 0
        blocks = [
            make_block(stage, i, dim, heads, grid, (side, side), shift if i % 2 else 0, next(rates))
            for i in range(depths[stage])
        ]
        stages.append(SwinStage(dim, blocks, stage + 1 < len(depths)))
    model.layers = nn.ModuleList(stages)
    model.norm = nn.LayerNorm(model.widths[-1])
    model.num_features = model.widths[-1]
