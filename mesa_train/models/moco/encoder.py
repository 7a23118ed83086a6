"""The encoders of MoCo v3 (arXiv 2104.02057), registered with timm.

A pre-norm ViT with a class token, fixed sin-cos positions and LayerNorm's eps of 1e-6. The patch
projection keeps its random initial weights: training it makes large batches unstable, which shows
as dips of the accuracy and not as a diverging loss.

| | width | blocks | heads | parameters with 1,000 classes | trained |
|---|---|---|---|---|---|
| moco_vit_small | 384 | 12 | 12 | 22,050,664 | 21,679,720 |
| moco_vit_base | 768 | 12 | 12 | 86,567,656 | 85,825,768 |
| moco_vit_conv_small | 384 | 11 | 12 | 21,002,392 | 20,926,744 |
| moco_vit_conv_base | 768 | 11 | 12 | 82,968,904 | 82,817,608 |

The small model has 12 heads of 32. timm's vit_small_patch16_224 has 6 heads of 64 and parameters of
the same shapes, so weights load into the wrong one without an error. The conv stem is never frozen.

`moco_vit_tiny` is a small model of this project, for images of 28 pixels and for tests.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

EPS = 1e-6


def sincos_position(grid: tuple[int, int], width: int, class_token: bool = True) -> Tensor:
    """The fixed position embedding, (1, 1 + rows * columns, width).

    A token at row r and column c, in row-major order, has sin(r w), cos(r w), sin(c w), cos(c w)
    with w_j = 10000^(-4 j / width). The row comes first; in MAE's table the column does.

    Args:
        grid: (rows, columns).
        width: a multiple of 4.
        class_token: prepend a row of zeros; default true.
    Raises:
        ValueError: the width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, got {width}")
    table = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True)
    if class_token:
        table = torch.cat([table.new_zeros(1, width), table])
    return table[None]


class ConvStem(nn.Module):
    """Patch embedding by four 3x3 convolutions of stride 2, and one of 1x1 (arXiv 2106.14881).

    It replaces timm's PatchEmbed for patches of 16: images (N, in_chans, H, W) become tokens
    (N, H/16 * W/16, embed_dim).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        **_: Any,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if patch_size != 16 or height % 16 or width % 16 or embed_dim % 8:
            raise ValueError(
                f"the conv stem has patches of 16 and needs images of a multiple of 16 pixels and a "
                f"width of a multiple of 8, got patch_size={patch_size}, img_size={img_size}, "
                f"embed_dim={embed_dim}"
            )
        layers: list[nn.Module] = []
        channels = in_chans
        for out in (embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim):
            conv = nn.Conv2d(channels, out, kernel_size=3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, kernel_size=1))
        self.img_size, self.patch_size = (height, width), (16, 16)
        self.grid_size = (height // 16, width // 16)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.img_size:
            raise ValueError(
                f"the encoder takes images of {self.img_size}, got {tuple(images.shape[-2:])}"
            )
        return self.proj(images).flatten(2).transpose(1, 2)


class MoCoViT(VisionTransformer):
    """timm's VisionTransformer with MoCo v3's positions, eps and initialisation.

    Args:
        stop_grad_conv1: freeze the patch projection, weight and bias; default true. No effect on
            the conv stem.
        options: arguments of `timm.models.vision_transformer.VisionTransformer`.
    """

    def __init__(self, *, stop_grad_conv1: bool = True, **options: Any) -> None:
        fixed = {"weight_init": "skip", "global_pool": "token", "class_token": True}
        norm = partial(nn.LayerNorm, eps=EPS)
        super().__init__(**{**options, **fixed, "norm_layer": norm})
        self.initialise()
        self.pos_embed.requires_grad_(False)
        if stop_grad_conv1 and isinstance(self.patch_embed.proj, nn.Conv2d):
            self.patch_embed.proj.requires_grad_(False)

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights from torch's global generator and compute the positions."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # Queries, keys and values are initialised as three matrices.
                parts = 3 if name.endswith("qkv") else 1
                bound = math.sqrt(6 / (module.in_features + module.out_features / parts))
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.patch_embed.proj
        if isinstance(projection, nn.Conv2d):
            fan = math.prod(projection.weight.shape[1:])
            bound = math.sqrt(6 / (fan + self.embed_dim))
            nn.init.uniform_(projection.weight, -bound, bound)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        table = sincos_position(self.patch_embed.grid_size, self.embed_dim)
        self.pos_embed.copy_(table.to(self.pos_embed))


def _cfg(size: int, first_conv: str = "patch_embed.proj") -> dict[str, Any]:
    """timm's description of a model without public weights in timm."""
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "crop_pct": 224 / 256,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "head",
    }


# By name: patch, width, depth, heads, image size.
SIZES = {
    "moco_vit_tiny": (7, 96, 4, 4, 28),
    "moco_vit_small": (16, 384, 12, 12, 224),
    "moco_vit_base": (16, 768, 12, 12, 224),
    "moco_vit_conv_small": (16, 384, 11, 12, 224),
    "moco_vit_conv_base": (16, 768, 11, 12, 224),
}
default_cfgs = generate_default_cfgs(
    {
        name: _cfg(size[-1], "patch_embed.proj.0" if "conv" in name else "patch_embed.proj")
        for name, size in SIZES.items()
    }
)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> MoCoViT:
    """Build a model of `SIZES` through timm."""
    patch, width, depth, heads, size = SIZES[name]
    given: dict[str, Any] = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "img_size": size,
    }
    if "conv" in name:
        given["embed_layer"] = ConvStem
    return build_model_with_cfg(
        MoCoViT,
        name,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**given, **options},
    )


@register_model
def moco_vit_tiny(pretrained: bool = False, **options: Any) -> MoCoViT:
    """0.6 million parameters with 1,000 classes, patches of 7, images of 28 pixels."""
    return _create("moco_vit_tiny", pretrained, options)


@register_model
def moco_vit_small(pretrained: bool = False, **options: Any) -> MoCoViT:
    """MoCo v3's ViT-S: 12 heads, where DeiT-S has 6."""
    return _create("moco_vit_small", pretrained, options)


@register_model
def moco_vit_base(pretrained: bool = False, **options: Any) -> MoCoViT:
    """MoCo v3's ViT-B."""
    return _create("moco_vit_base", pretrained, options)


@register_model
def moco_vit_conv_small(pretrained: bool = False, **options: Any) -> MoCoViT:
    """MoCo v3's ViT-S with a conv stem and 11 blocks."""
    return _create("moco_vit_conv_small", pretrained, options)


@register_model
def moco_vit_conv_base(pretrained: bool = False, **options: Any) -> MoCoViT:
    """MoCo v3's ViT-B with a conv stem and 11 blocks."""
    return _create("moco_vit_conv_base", pretrained, options)
