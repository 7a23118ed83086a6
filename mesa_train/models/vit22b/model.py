"""ViT-22B (arXiv 2302.05442): attention and MLP in parallel after one norm, two matmuls a block.

    y = norm(x);  x + W_out [attention(qn(q), kn(k), v), gelu(m)] + b_out,
    (q, k, v, m) = W_in y + (0, 0, 0, b_m)

The rows of W_in are grouped by head, [q | k | v | the head's share of the MLP]. So are the columns
of W_out, [attention | MLP]. Any cut between heads is therefore a valid tensor-parallel shard, and a
sharded block needs one sum over the ranks. The MLP's bias is part of the first matmul, so the four
parts are views of one product without any further addition.

A block saves the following elements per token for the backward, with width D, H heads of d = D / H
and an MLP of M = 4D. mesa8 needs 1 byte for each element, 4 for every 128, and 4 for the reciprocal
deviation of each norm:

    x_hat of the block's norm          D    for the norm and, as norm(x), for the first matmul
    x_hat of q's and k's norms        2D    for the norms and, as qn(q) and kn(k), for attention
    v, attention's output             2D    the output: for attention and the second matmul
    the MLP's hidden, before GELU     4D    for GELU and, as gelu(m), for the second matmul

q and k are saved before the gain of their norm. The norm's derivative reads x_hat, and one product
with the gain gives the norm's output. The norm's input would need the statistics too, and its
output a division.

The sum is 9D elements, 9D + 36D/128 + 4 + 8H bytes with mesa8 (57,412 for ViT-22B: 14.0 MiB an
image), and half the codes with mesa4. `recompute="linear"` repeats the first matmul and saves
x_hat, attention's output and the deviations: 2D + 8D/128 + 4 + 8H bytes (13,060: 3.2 MiB), and 14D
a block for the bias. Kernels that need the logsumexp add 4H bytes (flash on a GPU; on a CPU none up
to 512 tokens in half precision). PyTorch saves 17D elements of two bytes (51 MiB), and 21D with a
separate bias.

The sources differ in three points, which are options. Queries and keys are normalised without
centring, as in the paper (`qk_norm="rms"`), or with centring, as in Flax (`"layer"`). GELU is the
tanh form, Flax's default, or exact. The queries, keys and values of the pooling head have biases,
as in big_vision, or none (`pool_bias=False`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .init import initialise
from .layers import EPS, ParallelBlock
from .sequence_parallel import cut, joined

# By name: patch, width, depth, heads. The MLP is always 4 x width. With bf16 weights and 8-bit
# Adam, vit_22b_3b fills one card of 24 GB and vit_22b_11b one of 80 GB (recipes/vit22b).
SIZES = {
    "vit_22b_tiny": (14, 64, 3, 4),
    "vit_22b_small": (14, 384, 12, 6),
    "vit_22b_large": (14, 1024, 24, 16),
    "vit_22b_3b": (14, 2560, 36, 20),
    "vit_22b_11b": (14, 4608, 44, 36),
    "vit_22b": (14, 6144, 48, 48),
}


class ViT22B(VisionTransformer):
    """timm's VisionTransformer with `ParallelBlock`s, attention pooling and no class token.

    Images are (B, 3, H, W), with H and W any multiples of the patch. The position embedding,
    learned on the grid of `img_size`, is resampled to the grid of the images. The output is logits
    (B, num_classes) for `F.binary_cross_entropy_with_logits` (see `sigmoid_loss`). On the meta
    device no weight is initialised; see `init.initialise`.

    Args:
        qk_norm: "rms", "layer" or "none".
        gelu: "tanh" or "none" (exact).
        pool_bias: biases of the pooling head's queries, keys and values.
        made: device and dtype of the parameters. All other arguments are timm's.
    Attributes:
        tokens: the ranks over which tokens are sharded between the matmuls; or None.
    """

    tokens: DeviceMesh | None = None

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 14,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 6144,
        depth: int = 48,
        num_heads: int = 48,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qk_norm: str = "rms",
        gelu: str = "tanh",
        pool_bias: bool = True,
        **factory_kwargs: Any,
    ) -> None:
        def block(**arguments: Any) -> ParallelBlock:
            block_arguments = {
                k: arguments[k] for k in ("dim", "num_heads", "mlp_ratio", "drop_path")
            }
            return ParallelBlock(**block_arguments, qk_norm=qk_norm, gelu=gelu, **factory_kwargs)

        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            global_pool="map",
            class_token=False,
            dynamic_img_size=True,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.RMSNorm, eps=EPS),
            act_layer=partial(nn.GELU, approximate=gelu),
            block_fn=block,
            **factory_kwargs,
        )

        if not pool_bias:
            for projection in (self.attn_pool.q, self.attn_pool.kv):
                projection.register_parameter("bias", None)
        # `pool` selects the pooled token, because FSDP allows no views as outputs of its units.
        self.attn_pool.pool = "none"

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pool tokens (B, N, D) to features (B, D), the input of the classifier."""
        pooled = super().pool(x, pool_type)
        return pooled if self.attn_pool is None else pooled.flatten(1)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:  # noqa: ARG002
        """Draw all weights from torch's global generator. Does nothing on the meta device."""
        if not any(p.is_meta for p in self.parameters()):
            initialise(self, int(torch.randint(2**62, (), device="cpu")))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Flatten x (B, h, w, D) to tokens (B, h * w, D) and add the position embedding."""
        grid = (x.shape[1], x.shape[2])
        position = resampled(self.pos_embed, self.patch_embed.grid_size, grid)
        tokens = self.pos_drop(x.flatten(1, 2) + position)
        return tokens if self.tokens is None else cut(tokens, self.tokens)

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """All tokens (B, N, D) after the last norm."""
        tokens = super().forward_features(x, *args, **kwargs)
        return tokens if self.tokens is None else joined(tokens, self.tokens)

    def no_weight_decay(self) -> set[str]:
        """Matrices without weight decay. Biases and norms are exempt by their dimension."""
        return {"pos_embed", "attn_pool.latent"}


def resampled(position: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample a position embedding (1, h * w, D) to another grid.

    Bilinear with aligned corners, as in big_vision's `resample_posemb` with scipy's zoom.
    """
    if old == new:
        return position
    grid = position.float().unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, new, mode="bilinear", align_corners=True)
    return grid.flatten(2).mT.to(position.dtype)


def sigmoid_loss(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Sigmoid cross-entropy in float32, summed over classes and averaged over images.

    Args:
        logits: (B, classes).
        targets: labels (B,), or a share for each class (B, classes).
        z_loss: weight of log(sum(exp(logits)))^2, which bounds the drift of the logits; default 0.
    """
    logits = logits.float()
    if targets.dim() == 1:
        targets = F.one_hot(targets, logits.shape[-1])
    loss = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="sum")
    loss = loss / len(logits)
    return loss + z_loss * logits.logsumexp(-1).square().mean() if z_loss else loss


# Pixels from -1 to 1, as in big_vision's preprocessing. No weights are public.
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name in SIZES
    }
)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> ViT22B:
    """Build a model of `SIZES` through timm."""
    patch, width, depth, heads = SIZES[name]
    sizes = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    # `features_only=True` gives maps of blocks by `forward_intermediates`.
    features = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(
        ViT22B, name, pretrained, feature_cfg=features, **{**sizes, **options}
    )


@register_model
def vit_22b_tiny(pretrained: bool = False, **options: Any) -> ViT22B:
    """0.3 million parameters, for tests and two CPU processes."""
    return _create("vit_22b_tiny", pretrained, options)


@register_model
def vit_22b_small(pretrained: bool = False, **options: Any) -> ViT22B:
    """24 million parameters, the size of ViT-S."""
    return _create("vit_22b_small", pretrained, options)


@register_model
def vit_22b_large(pretrained: bool = False, **options: Any) -> ViT22B:
    """0.3 billion parameters, the size of ViT-L."""
    return _create("vit_22b_large", pretrained, options)


@register_model
def vit_22b_3b(pretrained: bool = False, **options: Any) -> ViT22B:
    """2.9 billion parameters."""
    return _create("vit_22b_3b", pretrained, options)


@register_model
def vit_22b_11b(pretrained: bool = False, **options: Any) -> ViT22B:
    """11.5 billion parameters."""
    return _create("vit_22b_11b", pretrained, options)


@register_model
def vit_22b(pretrained: bool = False, **options: Any) -> ViT22B:
    """ViT-22B: 22.2 billion parameters with the pooling head and 1,000 classes."""
    return _create("vit_22b", pretrained, options)
