"""Folding: the mixed convolutions of a fine-tuned network become plain convolutions.

The folded network has the same outputs in eval mode, up to rounding. Its kernels no longer share
weights. The published networks have fewer parameters when they are folded.
"""

from __future__ import annotations

import copy

import torch

from .layers import FoldedConv, MixedConv, mixed_kernels
from .network import SPViT


def fold(model: SPViT) -> SPViT:
    """Replace every mixed convolution of a network by its plain convolution, in place.

    Args:
        model: a network of a found architecture.
    Returns:
        `model`.
    Raises:
        ValueError: `model` is a search network.
    """
    if model.search:
        raise ValueError("fold takes a network of a found architecture, got a search network")
    for block in model.all_blocks():
        if isinstance(block.attn, MixedConv):
            block.attn = folded_conv(block.attn)
    return model


@torch.no_grad()
def folded_conv(layer: MixedConv) -> FoldedConv:
    """The plain convolution of a mixed convolution, in the same mode."""
    kernel, bias, out = mixed_kernels(
        layer.v, layer.proj, layer.head_probs, layer.mixing, layer.side
    )
    folded = FoldedConv(len(out), len(bias), layer.side, layer.grid).to(kernel)
    first, _, _, last = folded.bconv
    first.weight.copy_(kernel)  # type: ignore[operator]
    first.bias.copy_(bias)  # type: ignore[operator]
    last.weight.copy_(out[:, :, None, None])  # type: ignore[operator]
    last.bias.copy_(layer.proj.bias)  # type: ignore[operator]
    folded.bconv[1] = copy.deepcopy(layer.norm)
    return folded.train(layer.training)
