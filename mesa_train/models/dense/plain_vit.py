"""A plain Vision Transformer as a backbone of dense models, as ViTDet's (arXiv 2203.16527).

Most blocks attend inside windows; a few blocks, evenly spaced, attend over the whole map. The maps
of all strides come from the last map: by transposed convolutions, as it is, and by pooling.
Relative position biases, which ViTDet adds, are left out: timm's plain models have none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class PlainViT(nn.Module):
    """Images (B, 3, H, W) of any size to one map (B, C, H / patch, W / patch), in a list.

    Args:
        vit: a timm VisionTransformer with position embeddings. Its modules are used; class and
            register tokens and the head are dropped.
        window: side of a window in tokens; default 14.
        global_blocks: number of blocks that attend over the whole map; default 4.
    Raises:
        TypeError: `vit` is not a VisionTransformer.
        ValueError: no position embeddings, another patch embedding than one convolution, or more
            global blocks than blocks.
    """

    def __init__(self, vit: nn.Module, window: int = 14, global_blocks: int = 4) -> None:
        super().__init__()
        if not isinstance(vit, VisionTransformer):
            raise TypeError(f"plain_vit needs a timm VisionTransformer, got {type(vit).__name__}")
        if vit.pos_embed is None:
            raise ValueError("plain_vit needs a model with position embeddings")
        embed = vit.patch_embed
        if not isinstance(embed, PatchEmbed) or not isinstance(embed.norm, nn.Identity):
            raise ValueError(
                "plain_vit needs a model whose patch embedding is one convolution without a norm, "
                f"got {type(embed).__name__}"
            )
        depth = len(vit.blocks)
        if not 0 <= global_blocks <= depth:
            raise ValueError(f"global_blocks must be from 0 to {depth}, got {global_blocks}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.stride = vit.patch_embed.patch_size[0]
        self.grid = vit.patch_embed.grid_size
        self.channels = [vit.embed_dim]
        self.window = window
        self.global_blocks = {depth * (i + 1) // global_blocks - 1 for i in range(global_blocks)}
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        self.patch_embed = vit.patch_embed.proj
        self.pos_embed = nn.Parameter(vit.pos_embed.detach()[:, prefix:].clone())
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks
        self.norm = nn.LayerNorm(vit.embed_dim, eps=1e-6)
        self.grad_checkpointing = False
        # A plain ViT has no stages; its stem can be frozen.
        self.parts_by_stage = [("patch_embed", "pos_embed", "norm_pre")]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of all blocks on or off."""
        self.grad_checkpointing = enable

    def forward(self, images: Tensor) -> list[Tensor]:
        bottom, right = (-side % self.stride for side in images.shape[2:])
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        x = self.patch_embed(images).permute(0, 2, 3, 1)
        x = self.norm_pre(x + self._positions(x.shape[1], x.shape[2]))
        for index, block in enumerate(self.blocks):
            run = self._whole if index in self.global_blocks else self._windows
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(run, block, x, use_reentrant=False)
            else:
                x = run(block, x)
        return [self.norm(x).permute(0, 3, 1, 2).contiguous()]

    def _positions(self, height: int, width: int) -> Tensor:
        """Position embeddings (1, height, width, C), resized bicubically."""
        positions = self.pos_embed.unflatten(1, self.grid)
        if (height, width) == tuple(self.grid):
            return positions
        maps = positions.permute(0, 3, 1, 2)
        size = (height, width)
        return F.interpolate(maps, size, mode="bicubic", antialias=True).permute(0, 2, 3, 1)

    @staticmethod
    def _whole(block: nn.Module, x: Tensor) -> Tensor:
        return block(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

    def _windows(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run a block on windows of a map (B, H, W, C), padded with zeros to whole windows."""
        side = self.window
        batch, height, width, dim = x.shape
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.view(batch, rows, side, columns, side, dim).transpose(2, 3)
        x = block(x.reshape(-1, side * side, dim))
        x = x.view(batch, rows, columns, side, side, dim).transpose(2, 3)
        return x.reshape(batch, rows * side, columns * side, dim)[:, :height, :width]


class SimplePyramid(nn.Module):
    """Maps at several strides from one map.

    Args:
        in_channels: of the map.
        channels: of every output.
        strides: of the outputs, in pixels; each is the patch size times 1/4, 1/2, 1 or 2.
        extra: a block that appends levels (torchvision's ExtraFPNBlock), or None.
        patch: the stride of the map.
    Raises:
        ValueError: a stride is not one of these.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        strides: Sequence[int],
        extra: nn.Module | None,
        *,
        patch: int = 16,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for stride in strides:
            resize, width = _resizer(in_channels, stride / patch)
            output = [
                nn.Conv2d(width, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            ]
            self.levels.append(nn.Sequential(*resize, *output))
        self.extra_blocks: Any = extra

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        x = next(iter(maps.values()))
        results = [level(x) for level in self.levels]
        names = [str(level) for level in range(len(results))]
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, [x], names)
        return OrderedDict(zip(names, results, strict=True))


def _resizer(dim: int, scale: float) -> tuple[list[nn.Module], int]:
    """The modules that change a map's stride by `scale`, and their output's channels."""
    if scale == 0.25:
        first = [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), LayerNorm2d(dim // 2), nn.GELU()]
        return [*first, nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2)], dim // 4
    if scale == 0.5:
        return [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)], dim // 2
    if scale == 1:
        return [], dim
    if scale == 2:
        return [nn.MaxPool2d(2)], dim
    raise ValueError(
        f"a plain ViT's pyramid has strides 1/4, 1/2, 1 and 2 times its patch, not {scale:g}; patches "
        "of 16 pixels fit"
    )


def plain_vit(
    name: str | nn.Module, *, window: int = 14, global_blocks: int = 4, **options: Any
) -> PlainViT:
    """A plain backbone of a timm name or module.

    Args:
        name: of a timm VisionTransformer, or the module.
        window, global_blocks: see `PlainViT`.
        options: of `timm.create_model`.
    """
    import timm

    vit = timm.create_model(name, **options) if isinstance(name, str) else name
    return PlainViT(vit, window, global_blocks)
