"""LIT-Ti (arXiv 2105.14217): the smallest LIT, which has separate code in the authors' repository.

It has learned absolute positions at the start of every stage, layer norms with eps 1e-6, and a
class token. The class token is added in stage 4 and is the output. Names follow the authors' code.

With `dynamic_img_size=True` it is the backbone of the authors' detectors and segmenters: positions are
resized bilinearly to the map in every forward, and there is no class token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .classifier import Classifier, check_image_size, drop_path_rates, init_linear
from .deformable_merging import DeformableMerging
from .pyramid import Block, Mlp, PatchEmbed

_STAGES = (1, 2, 3, 4)


class LITTi(Classifier):
    """Image classifier for images of `img_size`; a timm model.

    Args:
        img_size: in pixels; default 224; fixed by the position embeddings.
        in_chans: default 3.
        num_classes: default 1000.
        global_pool: "token" (default), "avg" or "".
        widths: channels, per stage.
        depths: blocks, per stage.
        num_heads: heads, per stage; stages 1 and 2 have no attention.
        mlp_ratios: per stage.
        drop_rate: dropout before the head; default 0.
        drop_path_rate: of the last block; default 0.
        dynamic_img_size: images of any size, and no class token; a classifier then needs
            global_pool="avg". Default false.
    """

    pools = ("token", "avg", "")
    cls_token: Any
    # From (width, next width) to the merging before a stage. Subclasses may replace it.
    merging: Callable[[int, int], nn.Module] = DeformableMerging

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        self.img_size = to_2tuple(img_size)
        # The modules and positions of each stage, for a body whose first stages are frozen.
        self.parts_by_stage = [("patch_embed1", "pos_embed1")]
        self.parts_by_stage += [
            (f"block{i}", *((f"patch_embed{i}", f"pos_embed{i}") if i > 1 else ())) for i in _STAGES
        ]
        self.dynamic_img_size = dynamic_img_size
        check_image_size("LITTi", *self.img_size)
        self.num_features = widths[-1]
        self.depth, self.grad_checkpointing = len(_STAGES), False
        height, width = (-(-side // 4) for side in self.img_size)
        self.grids = [(height // 2**i, width // 2**i) for i in range(len(_STAGES))]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        eps = 1e-6

        def block(stage: int) -> Block:
            dim = widths[stage]
            attn = Attention(dim, num_heads[stage], qkv_bias=True) if stage >= 2 else None
            return Block(dim, attn, Mlp(dim, mlp_ratios[stage], depthwise=False), next(rates), eps)

        self.patch_embed1 = PatchEmbed(in_chans, widths[0])
        for stage in (2, 3, 4):
            merging = self.merging(widths[stage - 2], widths[stage - 1])
            self.add_module(f"patch_embed{stage}", merging)
        for stage, (rows, columns) in zip(_STAGES, self.grids, strict=True):
            tokens = rows * columns + (stage == 4)
            positions = nn.Parameter(torch.empty(1, tokens, widths[stage - 1]))
            trunc_normal_(positions, std=0.02)
            self.register_parameter(f"pos_embed{stage}", positions)
        for stage in _STAGES:
            blocks = [block(stage - 1) for _ in range(depths[stage - 1])]
            self.add_module(f"block{stage}", nn.ModuleList(blocks))
        self.norm: nn.Module = nn.LayerNorm(widths[-1], eps=eps)
        self.register_parameter("cls_token", None)
        if not dynamic_img_size:
            self.cls_token = nn.Parameter(torch.empty(1, 1, widths[-1]))
            trunc_normal_(self.cls_token, std=0.02)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"block{i + 1}"}
            for i, dim in enumerate(widths)
        ]
        self.set_head(num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens (B, 1 + tokens, num_features), the class token first.

        With `dynamic_img_size`, a normalised map (B, H, W, num_features).
        """
        x: Tensor = images
        for stage in _STAGES[: self.depth]:
            x = self._stage(stage, x)
        return self.norm(x)

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """Maps (B, H, W, C). Stage 4 gives tokens, the class token first, if there is one."""
        x: Tensor = images
        for stage in _STAGES[: self.depth]:
            x = self._stage(stage, x)
            yield x

    def pooled(self, x: Tensor) -> Tensor:
        """The class token, or the mean of all other tokens."""
        if self.dynamic_img_size:
            if self.global_pool == "token":
                raise ValueError('dynamic_img_size=True has no class token; use global_pool="avg"')
            return x.mean((1, 2))
        return x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1)

    def as_map(self, x: Tensor) -> Tensor:
        """A stage's output as a map, without the class token."""
        return x if x.dim() == 4 else x[:, 1:].unflatten(1, self.grids[3])

    def drop_stages(self, count: int) -> None:
        """Remove all stages after the first `count`."""
        for stage in _STAGES[count:]:
            for name in ("patch_embed", "block", "pos_embed"):
                delattr(self, f"{name}{stage}")
        self.depth = count

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of all blocks on or off."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The class token only: the authors' code decays the position embeddings."""
        return set() if self.dynamic_img_size else {"cls_token"}

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Run one stage. ValueError for images of another size than `img_size`."""
        if stage == 1:
            self._check_size(*x.shape[2:])
        x = self.get_submodule(f"patch_embed{stage}")(x)
        positions = self.get_parameter(f"pos_embed{stage}")
        grid = (x.shape[1], x.shape[2])
        if self.dynamic_img_size:
            x = x + self._resized(positions[:, int(stage == 4) :], stage, grid)
            if stage >= 3:
                x = x.flatten(1, 2)
        elif stage == 4:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1)
            x = x + positions
        elif stage == 3:
            x = x.flatten(1, 2) + positions
        else:
            x = x + positions.unflatten(1, self.grids[stage - 1])
        for block in self.get_submodule(f"block{stage}").children():
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x.unflatten(1, grid) if x.dim() == 3 and (stage == 3 or self.dynamic_img_size) else x

    def _check_size(self, height: int, width: int) -> None:
        if self.dynamic_img_size:
            check_image_size("LITTi", height, width)
        elif (height, width) != self.img_size:
            raise ValueError(
                f"this LITTi takes images of {self.img_size[0]}x{self.img_size[1]}, got "
                f"{height}x{width}; set img_size or dynamic_img_size=True when the model is built"
            )

    def _resized(self, positions: Tensor, stage: int, grid: tuple[int, int]) -> Tensor:
        """Positions (1, H, W, C) of a map, resized bilinearly if it has another size."""
        maps = positions.unflatten(1, self.grids[stage - 1])
        if grid == self.grids[stage - 1]:
            return maps
        maps = F.interpolate(maps.permute(0, 3, 1, 2), grid, mode="bilinear")
        return maps.permute(0, 2, 3, 1)


def resize_positions(weights: Mapping[str, Tensor], model: LITTi) -> dict[str, Tensor]:
    """A LIT-Ti checkpoint's weights for the image size of `model`, with interpolated positions."""
    dropped = ("cls_token",) if model.dynamic_img_size else ()
    resized = {key: value for key, value in weights.items() if key not in dropped}
    for stage, grid in zip(_STAGES, model.grids, strict=True):
        key = f"pos_embed{stage}"
        if key in resized:
            prefix = int(stage == 4)
            resized[key] = resample_abs_pos_embed(resized[key], grid, num_prefix_tokens=prefix)
    return resized
