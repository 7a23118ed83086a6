"""DynamicViT (arXiv 2106.02034) of DeiT and LV-ViT: predictors before three blocks drop tokens.

In eval mode each predictor keeps a fixed number of tokens, and the others are gone. In train mode
every token stays. The predictors draw decisions, a policy masks the attention by them, and the
output is a `TrainingOutput` for `mesa_train.models.dynamicvit.losses`. Names follow the authors'
code, so their checkpoints load (`mesa_train.models.dynamicvit.load_official`). A checkpoint of the
backbone alone loads too; the predictors then keep their values.

| | parameters | multiply-adds at 224 | keep_rate |
|---|---|---|---|
| dynamicvit_deit_256 | 10.3 M | 1.38 G | 0.7 |
| dynamicvit_deit_s | 22.8 M | 2.98 G | 0.7 |
| dynamicvit_deit_b | 89.5 M | 11.48 G | 0.7 |
| dynamicvit_lvvit_s | 26.9 M | 4.65 G | 0.7 |
| dynamicvit_lvvit_m | 57.1 M | 8.59 G | 0.7 |

`predictors=()` builds the backbone alone, which is the teacher of the distillation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mesa_train.models.common.classifier import (
    check_fixed_size,
    default_cfg,
    drop_path_rates,
    init_linear,
)
from mesa_train.models.common.straight_through import gumbel_softmax
from mesa_train.models.common.vit import TokenEmbed, resized_positions

from . import predictor
from .base import DynamicClassifier, check_predictors
from .layers import ConvStem, PolicyBlock
from .outputs import Pruned, TeacherOutput, TrainingOutput
from .predictor import KEEP, Predictor, keep_counts


class DynamicViT(DynamicClassifier):
    """Image classifier for images of `img_size`; a timm model.

    Args:
        keep_rate: share of the tokens that each predictor keeps of those before it; default 0.7.
        predictors: the blocks, from 0, that a predictor precedes; default 3, 6 and 9; () for none.
        img_size: in pixels; default 224; fixed by the position embeddings.
        in_chans: default 3.
        num_classes: default 1000.
        global_pool: "token" (default) or "".
        embed_dim: width; default 384.
        depth: blocks; default 12.
        num_heads: default 6; must divide `embed_dim`.
        mlp_ratio: default 4.
        lv_vit: LV-ViT's backbone: convolutional stem, halved branches, no biases of q, k and v, eps
            1e-5, and `aux_head`, a classifier of each token. Default false.
        drop_rate: dropout before the head; default 0.
        drop_path_rate: of the last block; default 0; the rate rises linearly from 0.
    Raises:
        ValueError: names the argument that is out of range.
    """

    pools = ("token", "")

    def __init__(
        self,
        keep_rate: float = 0.7,
        predictors: Sequence[int] = (3, 6, 9),
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        lv_vit: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_predictors(predictors, depth)
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4 and num_heads, got {embed_dim}")
        self.img_size = to_2tuple(img_size)
        self.num_features = self.embed_dim = embed_dim
        self.lv_vit, self.grad_checkpointing = lv_vit, False
        self.patch_embed: Any = (
            ConvStem(img_size, in_chans, embed_dim)
            if lv_vit
            else TokenEmbed(img_size, 16, in_chans, embed_dim)
        )
        rows, columns = self.patch_embed.grid_size
        self.predictors, self.keep_rate = tuple(predictors), keep_rate
        self.counts = keep_counts(rows * columns, keep_rate, len(predictors))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + rows * columns, embed_dim))
        for embedding in (self.cls_token, self.pos_embed):
            trunc_normal_(embedding, std=0.02)
        eps, divisor = (1e-5, 2) if lv_vit else (1e-6, 1)
        self.blocks = nn.ModuleList(
            PolicyBlock(embed_dim, num_heads, mlp_ratio, not lv_vit, eps, divisor, rate)
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps)
        self.score_predictor = nn.ModuleList(Predictor(embed_dim) for _ in predictors)
        self.set_head(num_classes, global_pool, drop_rate)
        if lv_vit:
            self.aux_head = self._classifier()
        self.apply(init_linear)

    @property
    def keep_rates(self) -> list[float]:
        """The share of all tokens that each predictor should keep, for the ratio loss."""
        return [self.keep_rate ** (stage + 1) for stage in range(len(self.predictors))]

    def prune(self, images: Tensor) -> Pruned:
        """Drop tokens as in inference. The kept tokens stay in the image's order."""
        x = self._embed(images)
        positions = torch.arange(x.shape[1] - 1, device=x.device).expand(len(x), -1)
        scores, kept = [], []
        for index, block in enumerate(self.blocks):
            if index in self.predictors:
                stage = self.predictors.index(index)
                score = self.score_predictor[stage](x[:, 1:])[..., KEEP]
                chosen = score.topk(self.counts[stage], dim=1).indices.sort(dim=1).values
                positions = positions.gather(1, chosen)
                scores.append(score)
                kept.append(positions)
                rows = chosen.unsqueeze(-1).expand(-1, -1, x.shape[2])
                x = torch.cat([x[:, :1], x[:, 1:].gather(1, rows)], dim=1)
            x = self._run(block, x)
        return Pruned(self.norm(x), tuple(scores), tuple(kept))

    def forward_train(
        self, images: Tensor, noise: Sequence[Tensor] | None = None
    ) -> TrainingOutput:
        """The forward of the training: every token stays, and dropped tokens are masked.

        Args:
            images: (B, in_chans, H, W).
            noise: Gumbel noise (B, N, 2) of each predictor; default: drawn.
        """
        x = self._embed(images)
        kept = x.new_ones(len(x), x.shape[1] - 1, 1)
        first = x.new_ones(len(x), 1, 1)
        decisions = []
        for index, block in enumerate(self.blocks):
            if index in self.predictors:
                stage = self.predictors.index(index)
                scores = self.score_predictor[stage](x[:, 1:], kept)
                drawn = gumbel_softmax(scores, None if noise is None else noise[stage])
                kept = drawn[..., KEEP : KEEP + 1] * kept
                decisions.append(kept)
            x = self._run(block, x, torch.cat([first, kept], dim=1))
        x = self.norm(x)
        tokens = self.aux_head(x[:, 1:]) if self.lv_vit else x[:, 1:]
        return TrainingOutput(self._class_logits(x), tokens, kept.detach(), tuple(decisions))

    def teach(self, images: Tensor) -> TeacherOutput:
        """The targets of the distillation. RuntimeError if the model has predictors."""
        if self.predictors:
            raise RuntimeError("a teacher keeps every token: build it with predictors=()")
        x = self.forward_features(images)
        tokens = self.aux_head(x[:, 1:]) if self.lv_vit else x[:, 1:]
        return TeacherOutput(self._class_logits(x), tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the class token. LV-ViT adds half of the largest logits of the other tokens.

        Args:
            x: (B, 1 + tokens, embed_dim).
            pre_logits: return the class token's features instead.
        """
        out = super().forward_head(x, pre_logits)
        if pre_logits or not self.lv_vit or not self.global_pool or not self.num_classes:
            return out
        return out + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    def pooled(self, x: Tensor) -> Tensor:
        """The class token."""
        return x[:, 0]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, and LV-ViT's `aux_head` with it."""
        super().reset_classifier(num_classes, global_pool)
        if self.lv_vit:
            self.aux_head = self._new_classifier()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of all blocks on or off."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The class token and the position embeddings."""
        return {"cls_token", "pos_embed"}

    def flops(self) -> int:
        """Multiply-adds of the products of the inference for one image of `img_size`."""
        rows, columns = self.patch_embed.grid_size
        tokens, dim = rows * columns, self.embed_dim
        total = (
            self.patch_embed.flops()
            if self.lv_vit
            else tokens * self.patch_embed.proj.weight.numel()
        )
        for index, block in enumerate(self.blocks):
            if index in self.predictors:
                total += predictor.flops(tokens, dim)
                tokens = self.counts[self.predictors.index(index)]
            total += block.flops(1 + tokens)  # type: ignore[operator]
        classified = 1 + tokens if self.lv_vit else 1
        return total + classified * dim * self.num_classes

    def adapt_checkpoint(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights for this image size, with resampled position embeddings.

        A checkpoint of the backbone alone gets this model's predictors.
        """
        adapted = dict(weights)
        if "pos_embed" in adapted:
            grid = self.patch_embed.grid_size
            adapted["pos_embed"] = resized_positions(adapted["pos_embed"], grid, 1)
        new = {k: v for k, v in self.state_dict().items() if k.startswith("score_predictor.")}
        return adapted if new.keys() & adapted.keys() else adapted | new

    def _embed(self, images: Tensor) -> Tensor:
        """Tokens (B, 1 + N, embed_dim) with positions, the class token first."""
        check_fixed_size("DynamicViT", images, self.img_size)
        x = self.patch_embed(images)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _class_logits(self, x: Tensor) -> Tensor:
        """The class token's logits, without those of other tokens."""
        return super().forward_head(x)


_LV = {"lv_vit": True, "mlp_ratio": 3.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "dynamicvit_deit_256": {"embed_dim": 256, "num_heads": 4},
    "dynamicvit_deit_s": {},
    "dynamicvit_deit_b": {"embed_dim": 768, "num_heads": 12},
    "dynamicvit_lvvit_s": {**_LV, "depth": 16, "predictors": (4, 8, 12)},
    "dynamicvit_lvvit_m": {
        **_LV,
        "embed_dim": 512,
        "depth": 20,
        "num_heads": 8,
        "predictors": (5, 10, 15),
    },
}
default_cfgs = generate_default_cfgs(
    {
        name: default_cfg(
            pool_size=None,
            fixed_input_size=True,
            first_conv="patch_embed.conv1" if "lvvit" in name else "patch_embed.proj",
        )
        for name in VARIANTS
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> Any:
    """Build a variant through timm. `predictors=()` leaves the backbone."""
    return build_model_with_cfg(DynamicViT, variant, pretrained, **VARIANTS[variant] | options)


@register_model
def dynamicvit_deit_256(pretrained: bool = False, **options: Any) -> DynamicViT:
    """DynamicViT of a DeiT of width 256."""
    return _create("dynamicvit_deit_256", pretrained, **options)


@register_model
def dynamicvit_deit_s(pretrained: bool = False, **options: Any) -> DynamicViT:
    """DynamicViT of DeiT-S."""
    return _create("dynamicvit_deit_s", pretrained, **options)


@register_model
def dynamicvit_deit_b(pretrained: bool = False, **options: Any) -> DynamicViT:
    """DynamicViT of DeiT-B. Its authors train it with drop_path_rate=0.2."""
    return _create("dynamicvit_deit_b", pretrained, **options)


@register_model
def dynamicvit_lvvit_s(pretrained: bool = False, **options: Any) -> DynamicViT:
    """DynamicViT of LV-ViT-S."""
    return _create("dynamicvit_lvvit_s", pretrained, **options)


@register_model
def dynamicvit_lvvit_m(pretrained: bool = False, **options: Any) -> DynamicViT:
    """DynamicViT of LV-ViT-M."""
    return _create("dynamicvit_lvvit_m", pretrained, **options)
