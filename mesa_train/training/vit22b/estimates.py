"""What the ViT-22B recipes need on five machines, part by part: `mesa_train.estimate.estimator` with the
recipes' ways to train as its setups.

Nothing is counted here. GPU kernels keep attention's logsumexp, 4 bytes a token and head, where a
CPU's in half precision keep nothing up to 512 tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mesa_train.estimate.estimator import RESERVE, Estimate, Estimator, Setup
from mesa_train.estimate.model_states import Cluster
from mesa_train.loading.model import Loaded, load
from mesa_train.measure.fake_tensors import gpu_norms
from mesa_train.measure.footprint import footprint
from mesa_train.methods.apply import CHECKPOINT, PLAIN
from mesa_train.policy import PRESETS

GIB = 2**30
CODED = "mesa8+coded"
RANK = 16

# By name, a title and what it is for the estimate.
SCHEMES = {
    "fsdp2": ("FSDP2, AdamW in float32", Setup("fsdp2")),
    "fp32+adam8": ("FSDP2, float32 weights, 8-bit Adam", Setup("fsdp2", optimizer="adamw8bit")),
    "bf16+adam8": (
        "FSDP2, bfloat16 weights and gradients, 8-bit Adam",
        Setup("fsdp2", optimizer="adamw8bit", half=True),
    ),
    "zero3": ("ZeRO-3, AdamW in float32", Setup("zero3")),
    "zero3-optimizer": ("ZeRO-3, optimizer on the host", Setup("zero3", "optimizer")),
    "zero3-offload": ("ZeRO-3, weights and optimizer on the host", Setup("zero3", "cpu")),
    "zero3-nvme": ("ZeRO-3, weights and optimizer on NVMe", Setup("zero3", "nvme")),
    "lion": ("steps in the backward, 8-bit moment", Setup("in_backward", optimizer="lion")),
    "factored": (
        "steps in the backward, factored moment",
        Setup("in_backward", optimizer="factored"),
    ),
    "nf4": ("NF4 frozen, LoRA", Setup(lora=RANK)),
    "probe": ("bfloat16 frozen, features only", Setup("frozen")),
}
# Methods that a single card takes; the others shard.
ALONE = ("lion", "factored", "nf4", "probe")
# name: GPUs, GiB of one. Main memory is not a limit here: what is needed of it is said.
MACHINES = {"1x24": (1, 24), "1x80": (1, 80), "8x24": (8, 24), "8x40": (8, 40), "8x80": (8, 80)}
POLICIES = (PLAIN, "mesa8", "mesa8-recompute", CODED)


def cluster(machine: str) -> Cluster:
    """A machine of `MACHINES`, without a limit to its CPU memory."""
    gpus, memory = MACHINES[machine]
    return Cluster(gpus, memory * GIB, 1 << 60)


def estimator(
    name: str, image_size: int, batch: int = 64, sizes: Sequence[int] | None = None
) -> Estimator:
    """Of a model by its timm name. ValueError as for `load`."""

    def make() -> Loaded:
        return load(name, batch_size=batch, image_size=image_size, device="meta")

    return Estimator(make, batch, sizes)


def one_card(
    name: str, scheme: str, image_size: int, batch: int, method: str, rank: int = RANK
) -> Estimate:
    """What one card needs for a step of `batch` images.

    scheme: of `ALONE`. method: as for `mesa_train.methods.apply`. rank: of nf4's adapters.
    ValueError for others.
    """
    if scheme not in ALONE:
        raise ValueError(f"scheme must be one of {', '.join(ALONE)}, got {scheme!r}")
    found = estimator(name, image_size, batch, [batch])
    setup = SCHEMES[scheme][1]
    setup = dataclasses.replace(setup, lora=rank) if setup.lora else setup
    return found.estimate(setup, method, Cluster(1, 1 << 60, 1 << 60))


def components(found: Estimate) -> dict[str, int]:
    """Bytes of one GPU, by what they are for; without the reserve, they are all of it."""
    held = found.states
    return {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "gathered": held.gathered,
        "activations": found.activations,
    }


def kept(name: str, image_size: int, method: str) -> int:
    """Bytes that one image more keeps between forward and backward."""
    sizes = []
    for images in (1, 2):
        loaded = load(name, batch_size=images, image_size=image_size, device="meta")
        model = loaded.model.bfloat16()
        with gpu_norms():
            sizes.append(footprint(model, loaded.inputs.bfloat16(), policy=method).saved_bytes)
    return sizes[1] - sizes[0]


def saved_by_method(name: str, image_size: int) -> dict[str, int]:
    """`kept` for PyTorch, checkpointing, every preset, and coded block inputs."""
    return {m: kept(name, image_size, m) for m in (PLAIN, CHECKPOINT, *PRESETS, CODED)}


def fits(of: Estimator, policies: tuple[str, ...] = POLICIES) -> list[dict[str, Any]]:
    """For every machine and scheme whose states leave room for an image: bytes of states a card and
    on the host, and for each policy the images that a card can take at once."""
    found: list[dict[str, Any]] = []
    for machine, (cards, _) in MACHINES.items():
        for key, (title, setup) in SCHEMES.items():
            if key in ALONE and cards > 1:
                continue
            # Features alone keep nothing, whatever the policy.
            counted = policies[:1] if key == "probe" else policies
            made = {p: of.estimate(setup, p, cluster(machine), RESERVE) for p in counted}
            images = {p: e.largest_batch for p, e in made.items()}
            if not any(images.values()):
                continue
            held = made[counted[0]].states
            states = {"states_bytes": held.gpu, "host_bytes": held.cpu, "disk_bytes": held.disk}
            found.append({"machine": machine, "scheme": title, **states, "images": images})
    return found
