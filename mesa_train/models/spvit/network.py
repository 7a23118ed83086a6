"""What SPViT's two families share: the architecture, its cost, the budget loss, the weights.

A network is of one of three forms:

- `search=True`: the search network, with gates.
- `msa=` and `ffn_keep=`: the network of a found architecture, for fine-tuning.
- `folded=True` with them: the same network with plain convolutions, for inference (`folding.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mesa_train.models.common.classifier import HeadedClassifier

from .layers import ATTENTION, KINDS
from .search import expected


class Architecture(NamedTuple):
    """A found architecture.

    Attributes:
        msa: of each block, which of [1x1, 3x3, attention] are on; [0, 0, 0] is a skip.
        ffn_keep: of each block, the number of kept hidden units.
        masks: of each block, the kept hidden units (hidden,) as bools.
    """

    msa: list[list[int]]
    ffn_keep: list[int]
    masks: list[Tensor]


class Cost(NamedTuple):
    """Multiply-adds of one image: of the network, of its attention layers, of its MLPs."""

    total: Tensor
    attention: Tensor
    ffn: Tensor


class BlockCost(NamedTuple):
    """Multiply-adds of one block for one image.

    Attributes:
        kinds: of a 1x1 convolution, a 3x3 convolution and attention.
        unit: of one hidden unit.
        fixed: of the norms.
    """

    kinds: tuple[int, int, int]
    unit: int
    fixed: int


def checked(
    name: str,
    msa: Sequence[Sequence[int]] | None,
    ffn_keep: Sequence[int] | None,
    hidden: Sequence[int],
) -> tuple[list[tuple[int, ...]], list[int]]:
    """An architecture for blocks of `hidden` units. None stands for all layers or units.

    Raises:
        ValueError: a list has another length, or a value is out of range.
    """
    rows = [ATTENTION] * len(hidden) if msa is None else msa
    layers: list[tuple[int, ...]] = [tuple(map(int, row)) for row in rows]
    keep = list(hidden) if ffn_keep is None else [int(count) for count in ffn_keep]
    for field, values in (("msa", layers), ("ffn_keep", keep)):
        if len(values) != len(hidden):
            raise ValueError(f"{name}: {field} must have {len(hidden)} entries, got {len(values)}")
    for index, kind in enumerate(layers):
        if kind not in KINDS:
            choices = ", ".join(str(list(known)) for known in KINDS)
            raise ValueError(f"{name}: msa[{index}] must be one of {choices}, got {list(kind)}")
    for index, (count, units) in enumerate(zip(keep, hidden, strict=True)):
        if not 1 <= count <= units:
            raise ValueError(f"{name}: ffn_keep[{index}] must be from 1 to {units}, got {count}")
    return layers, keep


class SPViT(HeadedClassifier):
    """Base of both families. A subclass sets `search`, `kinds` and `kept`, and its blocks' costs.

    Attributes:
        search: whether this is the search network.
        kinds: of each block, the layer in the place of attention.
        kept: of each block, the hidden units.
    """

    search: bool
    kinds: list[tuple[int, ...]]
    kept: list[int]
    grad_checkpointing = False

    def all_blocks(self) -> list[Any]:
        """The blocks in order; each has `attn` and `mlp`."""
        raise NotImplementedError

    def block_costs(self) -> list[BlockCost]:
        """The cost of each block."""
        raise NotImplementedError

    def fixed_cost(self) -> int:
        """Multiply-adds outside of the blocks for one image."""
        raise NotImplementedError

    def forward(self, images: Tensor, uniforms: Sequence[Tensor] | None = None) -> Tensor:
        """Classify images.

        Args:
            images: (B, in_chans, H, W).
            uniforms: of a search network in train mode, draws from [0, 1): for each block (3,) and
                then (hidden,); default: drawn.
        """
        return self.forward_head(self.forward_features(images, uniforms))

    def forward_features(self, images: Tensor, uniforms: Sequence[Tensor] | None = None) -> Tensor:
        """The normalised features. The draws are as for `forward`."""
        raise NotImplementedError

    def run_block(self, block: nn.Module, x: Tensor, uniforms: Sequence[Tensor] | None) -> Tensor:
        """Run a block, checkpointed if the model is set so."""
        draws = () if uniforms is None else tuple(uniforms)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, *draws, use_reentrant=False)
        return block(x, *draws)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn activation checkpointing of all blocks on or off."""
        self.grad_checkpointing = enable

    def block_uniforms(
        self, uniforms: Sequence[Tensor] | None, block: int
    ) -> Sequence[Tensor] | None:
        """The draws of one block: of its 3 attention gates, then of its hidden units' gates."""
        return None if uniforms is None else uniforms[2 * block : 2 * block + 2]

    def cost(self) -> Cost:
        """Multiply-adds of one image. Differentiable in the thresholds of a search network."""
        like = next(self.norm.parameters())
        total = like.new_tensor(float(self.fixed_cost()), dtype=torch.float64)
        attention, ffn = torch.zeros_like(total), torch.zeros_like(total)
        for block, cost, kind, kept in zip(
            self.all_blocks(), self.block_costs(), self.kinds, self.kept, strict=True
        ):
            if self.search:
                on = block.attn.expected_kinds().double()
                units = expected(block.mlp.ffn_thresholds).double().sum()
            else:
                on = total.new_tensor(kind).cumprod(0)
                units = total.new_tensor(float(kept))
            one, three, full = cost.kinds
            attention = attention + on @ total.new_tensor([one, three - one, full - three])
            ffn = ffn + units * cost.unit
            total = total + cost.fixed
        return Cost(total + attention + ffn, attention, ffn)

    def flops(self) -> int:
        """Multiply-adds of one image of `img_size`, counted as in the authors' code."""
        return int(self.cost().total)

    def budget_loss(self, target: float, weight: float) -> Tensor:
        """weight * (target - cost)^2.

        Args:
            target: of the multiply-adds, in units of 1e9; rounded to float32, as in the authors'
                code.
            weight: lambda of the paper.
        """
        total = self.cost().total
        rounded = torch.tensor(target, dtype=torch.float32).to(total)
        return weight * (rounded - total / 1e9).square()

    def architecture(self) -> Architecture:
        """The architecture that a search network has found.

        Raises:
            RuntimeError: this is no search network.
        """
        if not self.search:
            raise RuntimeError("only a search network, built with search=True, finds one")
        msa, masks = [], []
        for block in self.all_blocks():
            msa.append([int(on) for on in block.attn.expected_kinds().tolist()])
            masks.append(block.mlp.kept())
        return Architecture(msa, [int(mask.sum()) for mask in masks], masks)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The thresholds, which the authors train with an optimizer of their own."""
        return [p for name, p in self.named_parameters() if "thresholds" in name]

    def adapt_checkpoint(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a pretrained DeiT or Swin for this network.

        `qkv` becomes `qk` and `v`. Parts that this network does not have are dropped. Parts that
        the pretrained network does not have (gates, `head_probs`, batch norms) keep their values.
        """
        adapted, own = dict(weights), self.state_dict()
        pretrained = any(".attn.qkv." in key for key in weights)
        for key in list(adapted):
            if ".attn.qkv." in key:
                qkv = adapted.pop(key)
                split = 2 * len(qkv) // 3
                adapted[key.replace(".qkv.", ".qk.")] = qkv[:split]
                adapted[key.replace(".qkv.", ".v.")] = qkv[split:]
        if not pretrained:
            return adapted
        adapted = {k: v for k, v in adapted.items() if k in own or ".attn." not in k}
        new = ("thresholds", "thresholds_full", "head_probs", "assigned_indicator_index")
        for key, value in own.items():
            if key.endswith(new) or ".attn.bn_" in key or key.endswith("attn_mask"):
                adapted.setdefault(key, value)
            elif key.endswith("relative_position_index"):
                adapted[key] = value
        return adapted


def pruned_weights(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a pretrained network with the hidden units that masks keep.

    Args:
        weights: a state dict with `{block}.mlp.fc1` and `fc2`.
        masks: of each block's name, such as "blocks.0", the kept units (hidden,), 0 or 1.
    Raises:
        ValueError: a block is missing, or its mask has another length.
    """
    pruned = dict(weights)
    for block, mask in masks.items():
        for name, dim in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
            key = f"{block}.mlp.{name}"
            if key not in weights:
                raise ValueError(f"masks: the weights have no {key}")
            if weights[key].shape[dim] != len(mask):
                raise ValueError(
                    f"masks: {block} has {weights[key].shape[dim]} hidden units, its mask {len(mask)}"
                )
            pruned[key] = weights[key].index_select(dim, mask.bool().nonzero().squeeze(1))
    return pruned


def masks_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks by block's name in the authors' mask file, or in a search network's state dict."""
    ending = ".mlp.assigned_indicator_index"
    return {key.removesuffix(ending): v for key, v in weights.items() if key.endswith(ending)}
