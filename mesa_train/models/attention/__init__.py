"""The attention layers that HiLo was compared with, behind one signature, for benchmarks.

Each layer is `Layer(dim, num_heads, height, width, **options)`, a module from maps (B, H, W, dim)
to maps of the same shape. `flops(height, width)` counts the multiply-adds of one map by the rules
of the published benchmark (github.com/HubHop/vit-attention-benchmark). With the default options,
parameters and counts of 768 channels, 12 heads and 14x14 tokens are the published ones.

    >>> from mesa_train.models.attention import create_attention
    >>> layer = create_attention("xca", 768, 12, 14, 14)
    >>> layer.flops(14, 14)
    481689600
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .base import AttentionLayer as AttentionLayer
from .convolutions import GatedConvolution, LargeKernelAttention
from .deformable import DeformableAttention
from .focal import FocalAttention
from .full import MSA, SRA, XCA, LinearSRA, TwinsGlobal, TwinsLocal
from .linear import Linformer, Performer
from .own import EcoFormerLayer, HiLoAttention
from .quadtree import QuadTreeAttention
from .windows import CrossWindowAttention, ShiftedWindowAttention, WindowAttention

ATTENTION_LAYERS: dict[str, Callable[..., AttentionLayer]] = {
    "hilo": HiLoAttention,
    "msa": MSA,
    "window": WindowAttention,
    "shifted_window": ShiftedWindowAttention,
    "cross_window": CrossWindowAttention,
    "sra": SRA,
    "linear_sra": LinearSRA,
    "twins_local": TwinsLocal,
    "twins_global": TwinsGlobal,
    "linformer": Linformer,
    "performer": Performer,
    "xca": XCA,
    "ecoformer": EcoFormerLayer,
    "focal": FocalAttention,
    "quadtree": QuadTreeAttention,
    "dat": DeformableAttention,
    "van": LargeKernelAttention,
    "hornet": GatedConvolution,
}


def create_attention(
    name: str, dim: int, num_heads: int, height: int, width: int, **options: Any
) -> AttentionLayer:
    """Build a layer of `ATTENTION_LAYERS` by its name.

    Args:
        name: of the layer.
        dim: width.
        num_heads: heads.
        height: rows of the map in tokens.
        width: columns of the map in tokens.
        options: more arguments of the layer.
    Raises:
        ValueError: no layer has this name, or an argument is out of range.
    """
    if name not in ATTENTION_LAYERS:
        raise ValueError(f"name must be one of {', '.join(ATTENTION_LAYERS)}, got {name!r}")
    return ATTENTION_LAYERS[name](dim, num_heads, height, width, **options)
