"""What EcoFormer's two backbones share: stages of maps, operation counts, the authors' weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mesa_train.models.lit.classifier import Classifier
from mesa_train.models.lit.pyramid import Block, Mlp

from .attention import EcoFormerAttention, MapAttention

ATTENTIONS = ("ecoformer", "msa")
MULTIPLICATION_PJ, ADDITION_PJ = 3.7, 0.9  # of a float32 operation in 45 nm


class PatchEmbed(nn.Module):
    """Convolution and layer norm: a map (B, H, W, in_dim) or images to a map (B, H', W', dim).

    Args:
        in_dim: channels before.
        dim: channels after.
        kernel: side of the convolution's kernel.
        stride: of the convolution.
    """

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        padding = kernel // 2 if kernel > stride else 0
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """The sides of the map after it."""
        kernel, stride, padding = (
            self.proj.kernel_size[0],
            self.proj.stride[0],
            int(self.proj.padding[0]),
        )
        height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        return height, width


def make_block(
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    drop_path: float,
    kernel: str | None,
    depthwise: bool,
) -> Block:
    """A block of maps, with hashed attention, or softmax attention if `kernel` is None."""
    attn = (
        MapAttention(dim, num_heads, qkv_bias=True)
        if kernel is None
        else EcoFormerAttention(dim, num_heads, kernel)
    )
    return Block(dim, attn, Mlp(dim, mlp_ratio, depthwise=depthwise), drop_path, eps=1e-6)


def stage_kernels(attention: str, kernel: str, stages: int) -> list[str | None]:
    """The kernel of each stage; None for softmax attention, which the last stage always has.

    Raises:
        ValueError: `attention` is another name.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    hashed = kernel if attention == "ecoformer" else None
    return [hashed] * (stages - 1) + [None]


class EcoFormer(Classifier):
    """Base of both backbones: an image classifier whose maps are (B, H, W, C).

    Attributes:
        widths: channels, per stage.
        img_size: the size that `operations` counts by default.
    """

    widths: Sequence[int]
    img_size: tuple[int, int]
    grad_checkpointing = False

    def embed_of(self, stage: int) -> PatchEmbed:
        """The patch embedding before a stage."""
        raise NotImplementedError

    def blocks_of(self, stage: int) -> nn.ModuleList:
        """The blocks of a stage."""
        raise NotImplementedError

    def run_stage(self, stage: int, x: Tensor) -> Tensor:
        """The map of a stage from the map before it."""
        raise NotImplementedError

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the map (B, H, W, C) of each stage."""
        x = images.permute(0, 2, 3, 1)
        for stage in range(self.depth):
            x = self.run_stage(stage, x)
            yield x

    def forward_features(self, images: Tensor) -> Tensor:
        """The normalised map of the last stage (B, H / 32, W / 32, num_features)."""
        x = images.permute(0, 2, 3, 1)
        for stage in range(self.depth):
            x = self.run_stage(stage, x)
        return self.norm(x)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over all tokens."""
        return x.mean((1, 2))

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run a block, checkpointed if the model is set so."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of all blocks on or off."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Matrices without weight decay: none."""
        return set()

    def operations(self, img_size: int | tuple[int, int] | None = None) -> tuple[int, int]:
        """(multiplications, additions) of one image, counted as in the authors' script.

        A multiply-add of a convolution or a Linear is one of each. Norms, biases, exponentials and
        quotients do not count.

        Args:
            img_size: in pixels; default: the model's own.
        """
        parts = self.operations_by_part(img_size).values()
        return sum(mul for mul, _ in parts), sum(add for _, add in parts)

    def operations_by_part(
        self, img_size: int | tuple[int, int] | None = None
    ) -> dict[str, tuple[int, int]]:
        """`operations` of each stage and of the head, by name."""
        height, width = to_2tuple(img_size or self.img_size)
        counts: dict[str, tuple[int, int]] = {}
        for stage in range(self.depth):
            embed = self.embed_of(stage)
            height, width = embed.sides(height, width)
            tokens = height * width
            weights = [
                m.weight
                for part in self.parts_of(stage)
                for m in part.modules()
                if isinstance(m, (nn.Linear, nn.Conv2d))
            ]
            products = tokens * sum(weight.numel() for weight in weights)
            multiplications, additions = products, products
            for block in self.blocks_of(stage):
                mul, add = block.attn.operations(tokens)  # type: ignore[union-attr, operator]
                multiplications, additions = multiplications + mul, additions + add
            counts[f"stage {stage + 1}"] = multiplications, additions
        products = self.head.weight.numel() if isinstance(self.head, nn.Linear) else 0
        counts["head"] = products, products
        return counts

    def parts_of(self, stage: int) -> list[nn.Module]:
        """The modules of a stage that have weights."""
        return [self.embed_of(stage), self.blocks_of(stage)]

    def energy_pj(self, img_size: int | tuple[int, int] | None = None) -> float:
        """Energy of one image in pJ by the authors' formula: 3.7 a multiplication, 0.9 an addition.

        It is an estimate from counts, not a measurement.
        """
        return self.energy_of(*self.operations(img_size))

    @staticmethod
    def energy_of(multiplications: int, additions: int) -> float:
        """Energy of counted operations in pJ."""
        return MULTIPLICATION_PJ * multiplications + ADDITION_PJ * additions

    def adapt_checkpoint(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the authors' three steps, for this model's attention.

        - Weights of the original PVTv2 or Twins: q and kv become qkv; the spatial reduction is
          dropped.
        - Weights of softmax attention, for a hashed layer: to_qk is the part of the queries, to_v
          that of the values. The keys are dropped. The hash keeps this model's buffers.
        """
        adapted, own = dict(weights), self.state_dict()
        for name, module in self.named_modules():
            if not isinstance(module, (EcoFormerAttention, MapAttention)):
                continue
            for leaf in ("weight", "bias"):
                q, kv = (
                    adapted.pop(f"{name}.q.{leaf}", None),
                    adapted.pop(f"{name}.kv.{leaf}", None),
                )
                if q is not None and kv is not None:
                    adapted[f"{name}.qkv.{leaf}"] = torch.cat([q, kv])
                for part in ("sr", "norm"):
                    adapted.pop(f"{name}.{part}.{leaf}", None)
                if isinstance(module, EcoFormerAttention):
                    qkv = adapted.pop(f"{name}.qkv.{leaf}", None)
                    if qkv is not None:
                        adapted[f"{name}.to_qk.{leaf}"], _, adapted[f"{name}.to_v.{leaf}"] = (
                            qkv.chunk(3)
                        )
            kernel = f"{name}.fast_attention."
            if not any(key.startswith(kernel) for key in adapted):
                adapted |= {key: value for key, value in own.items() if key.startswith(kernel)}
        return adapted


def feature_info(widths: Sequence[int], module: str, first: int) -> list[dict[str, Any]]:
    """timm's description of the stages' maps. `module` + number names the last module of a stage."""
    return [
        {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"{module}{stage + first}"}
        for stage, dim in enumerate(widths)
    ]
