"""What a ViT-22B (or a sibling) needs on each card, part by part, before anything is started.

Counted on the meta device: parameters by their shapes, activations by `mesa_train.footprint` (fakes
of the CPU's kernels: GPU kernels add the logsumexp, 4 bytes a token and head). Not counted, and left
free as `RESERVE`: the context, workspaces and the allocator's slack. Sharded schemes hold two
gathered blocks, the one that computes and the next one. Working memory includes what a block's own
forward and backward make and drop for each image: 21 numbers a channel and token in bfloat16.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

import mesa_train
from mesa_train.memory.methods import CHECKPOINT, PLAIN
from mesa_train.policy import PRESETS, Policy

from .in_backward import state_bytes

GIB = 2**30
RESERVE = int(1.5 * GIB)
CODED = "coded"
# Products, their gradients and decoded operands of one block, in units of the width.
_MADE = 21


@dataclass(frozen=True)
class Scheme:
    """How model states are kept. Bytes a parameter, on the card and on the host.

    sharded: the states are cut over the cards. gathered: bytes a parameter of a gathered block.
    frozen: only adapters train, no gradients of the model exist.
    """

    name: str
    card: float
    host: float
    sharded: bool = True
    gathered: float = 2.0
    frozen: bool = False


# fp32 shards 4 + gradients 4 + Adam 8; ZeRO-3: bf16 2 + 2, fp32 12 on the host; bf16 weights and
# gradients with two 8-bit moments; one 8-bit moment or a factored one with gradients that live for
# one parameter; NF4 with double quantisation.
SCHEMES = {
    "fsdp2": Scheme("FSDP2, AdamW in float32", 16.0, 0.0),
    "fp32+adam8": Scheme("float32 weights, 8-bit Adam", 10.03, 0.0),
    "bf16+adam8": Scheme("bfloat16 weights and gradients, 8-bit Adam", 6.03, 0.0),
    "zero3-cpu": Scheme("ZeRO-3, optimizer on the host", 2.0, 16.0),
    "zero3-offload": Scheme("ZeRO-3, weights and optimizer on the host", 0.0, 18.0),
    "lion8": Scheme("steps in the backward, 8-bit moment", 3.03, 0.0, sharded=False, gathered=0.0),
    "factored": Scheme("steps in the backward, factored moment", 2.0, 0.0, False, 0.0),
    "nf4": Scheme("NF4 frozen, LoRA", 0.52, 0.0, sharded=False, gathered=2.0, frozen=True),
    "probe": Scheme("bfloat16 frozen, features only", 2.0, 0.0, sharded=False, frozen=True),
}
MACHINES = {"1x24": (1, 24), "1x80": (1, 80), "8x24": (8, 24), "8x40": (8, 40), "8x80": (8, 80)}


@dataclass(frozen=True)
class Estimate:
    """Bytes on one card by part, for `images` at a time; host bytes over the whole machine."""

    states: int
    working: int
    activations: int
    host: int

    @property
    def total(self) -> int:
        return self.states + self.working + self.activations


class Sizes:
    """Counts of one model, made once and used by every estimate."""

    def __init__(self, name: str = "vit_22b", image_size: int = 224) -> None:
        import timm

        import mesa_train.models  # noqa: F401

        self.name, self.image_size = name, image_size
        with torch.device("meta"):
            self.model: Any = timm.create_model(name, img_size=image_size, dtype=torch.bfloat16)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.block = sum(p.numel() for p in self.model.blocks[0].parameters())
        self.depth = len(self.model.blocks)
        self.tokens = (image_size // self.model.patch_embed.patch_size[0]) ** 2
        self._kept: dict[str, int] = {}

    def kept(self, policy: str) -> int:
        """Bytes that one image keeps for the backward (weights that a batch shares left out):
        "plain", "checkpoint", a preset, or "coded": block inputs in 8 bits and, in the backward,
        one block's mesa8 stashes at a time."""
        if policy not in self._kept:
            if policy == CODED:
                self.model.set_grad_checkpointing(True)
                try:
                    coded = dataclasses.replace(PRESETS["mesa8"], checkpoint_inputs=8)
                    inputs = self._count(coded, 2) - self._count(coded, 1)
                finally:
                    self.model.set_grad_checkpointing(False)
                self._kept[policy] = inputs + self.kept("mesa8") // self.depth
            elif policy == PLAIN:
                # A CPU's RMS norm is made of many operators, each of which keeps something. A GPU
                # keeps 17 units of D bfloat16 numbers a token (see vit22b.py), and statistics.
                heads = self.model.attn_pool.num_heads
                each = 34 * self.model.embed_dim + 4 + 12 * heads
                self._kept[policy] = self.depth * self.tokens * each
            else:
                self._kept[policy] = self._count(policy, 2) - self._count(policy, 1)
        return self._kept[policy]

    def largest_batch(self, scheme: Scheme, machine: str, policy: str) -> int:
        """Images a card can take at once; 0 if the states alone do not fit."""
        cards, capacity = MACHINES[machine]
        empty = estimate(self, scheme, cards, policy, 0).total
        each = estimate(self, scheme, cards, policy, 1).total - empty
        return max(0, (capacity * GIB - RESERVE - empty) // each)

    def _count(self, policy: Policy | str, images: int) -> int:
        size = self.image_size
        inputs = torch.empty(images, 3, size, size, device="meta", dtype=torch.bfloat16)
        return mesa_train.footprint(self.model, inputs, policy=policy).saved_bytes


def estimate(sizes: Sizes, scheme: Scheme, cards: int, policy: str, images: int) -> Estimate:
    """Bytes of one card of `cards` for `images` on each. ValueError for an unknown policy."""
    choices = (PLAIN, CHECKPOINT, CODED, *PRESETS)
    if policy not in choices:
        raise ValueError(f"policy must be one of {', '.join(choices)}, got {policy!r}")
    share = cards if scheme.sharded else 1
    states = int(sizes.parameters * scheme.card / share)
    if scheme.name == SCHEMES["lion8"].name:
        states = 2 * sizes.parameters + state_bytes(sizes.model.parameters(), "lion")
    if scheme.name == SCHEMES["factored"].name:
        states = 2 * sizes.parameters + state_bytes(sizes.model.parameters(), "factored")
    # Two gathered blocks and one block's gradients; without shards one parameter's gradient and the
    # float32 rows of its update; for a decoded 4-bit matrix its bfloat16 copy.
    largest = max(p.numel() for p in sizes.model.parameters())
    if scheme.frozen:
        working = int(largest * 2)
    elif scheme.sharded and (cards > 1 or not scheme.card):
        working = int(2 * sizes.block * scheme.gathered + sizes.block * 2)
    else:
        working = 2 * largest + 5 * 4 * (1 << 24)
    working += images * sizes.tokens * sizes.model.embed_dim * 2 * _MADE
    # A matmul of 4-bit weights is never repeated; features alone need no graph.
    counted = policy.removesuffix("-recompute") if scheme.frozen else policy
    features = scheme.name == SCHEMES["probe"].name
    activations = 0 if features else images * sizes.kept(counted)
    return Estimate(states, working, activations, int(sizes.parameters * scheme.host))


def fits(
    sizes: Sizes, policies: tuple[str, ...] = (PLAIN, "mesa8", "mesa8-recompute", CODED)
) -> list[dict[str, Any]]:
    """For every machine and scheme whose states fit: bytes of states a card and on the host, and for
    each policy the images that a card can take at once."""
    found: list[dict[str, Any]] = []
    for machine, (cards, capacity) in MACHINES.items():
        for key, scheme in SCHEMES.items():
            first = estimate(sizes, scheme, cards, policies[0], 0)
            if (not scheme.sharded and cards > 1) or first.total > capacity * GIB - RESERVE:
                continue
            # Features alone keep nothing, whatever the policy.
            counted = policies[:1] if key == "probe" else policies
            images = {p: sizes.largest_batch(scheme, machine, p) for p in counted}
            states = {"states_bytes": first.states, "host_bytes": first.host}
            found.append({"machine": machine, "scheme": scheme.name, **states, "images": images})
    return found
