"""Memory estimates of the ViT-22B recipes on five machines, by component.

This file defines the recipes' training setups; `mesa_train.estimate.estimator` does all counting.
GPU kernels save attention's logsumexp, 4 bytes for each token and head. CPU kernels in half
precision save nothing up to 512 tokens.
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

# By name: a title, and the setup for the estimator.
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
# Schemes for a single card; the others shard.
ALONE = ("lion", "factored", "nf4", "probe")
# By name: number of GPUs, GiB of one GPU. CPU memory is not limited here; the estimate states the
# CPU memory that a scheme needs.
MACHINES = {"1x24": (1, 24), "1x80": (1, 80), "8x24": (8, 24), "8x40": (8, 40), "8x80": (8, 80)}
POLICIES = (PLAIN, "mesa8", "mesa8-recompute", CODED)


def cluster(machine: str) -> Cluster:
    """A machine of `MACHINES`, with unlimited CPU memory."""
    gpus, memory = MACHINES[machine]
    return Cluster(gpus, memory * GIB, 1 << 60)


def estimator(
    name: str, image_size: int, batch: int = 64, sizes: Sequence[int] | None = None
) -> Estimator:
    """An estimator of a model by its timm name. ValueError as for `load`."""

    def make() -> Loaded:
        return load(name, batch_size=batch, image_size=image_size, device="meta")

    return Estimator(make, batch, sizes)


def one_card(
    name: str, scheme: str, image_size: int, batch: int, method: str, rank: int = RANK
) -> Estimate:
    """Estimate the memory that one card needs for a step.

    Args:
        name: a timm model.
        scheme: one of `ALONE`.
        image_size: in pixels.
        batch: images in the step.
        method: as for `mesa_train.methods.apply`.
        rank: of nf4's adapters; default 16.
    Raises:
        ValueError: the scheme is unknown.
    """
    if scheme not in ALONE:
        raise ValueError(f"scheme must be one of {', '.join(ALONE)}, got {scheme!r}")
    found = estimator(name, image_size, batch, [batch])
    setup = SCHEMES[scheme][1]
    setup = dataclasses.replace(setup, lora=rank) if setup.lora else setup
    return found.estimate(setup, method, Cluster(1, 1 << 60, 1 << 60))


def components(found: Estimate) -> dict[str, int]:
    """Bytes of one GPU by component. Their sum is the total without the reserve."""
    held = found.states
    return {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "gathered": held.gathered,
        "activations": found.activations,
    }


def kept(name: str, image_size: int, method: str) -> int:
    """Bytes that each further image saves for the backward."""
    sizes = []
    for images in (1, 2):
        loaded = load(name, batch_size=images, image_size=image_size, device="meta")
        model = loaded.model.bfloat16()
        with gpu_norms():
            sizes.append(footprint(model, loaded.inputs.bfloat16(), policy=method).saved_bytes)
    return sizes[1] - sizes[0]


def saved_by_method(name: str, image_size: int) -> dict[str, int]:
    """`kept` for PyTorch, checkpointing, every preset and coded block inputs."""
    return {m: kept(name, image_size, m) for m in (PLAIN, CHECKPOINT, *PRESETS, CODED)}


def fits(of: Estimator, policies: tuple[str, ...] = POLICIES) -> list[dict[str, Any]]:
    """The machines and schemes whose states leave memory for at least one image.

    Returns:
        For each: bytes of states on a card, on the host and on the disk, and the largest batch of a
            card for each policy.
    """
    found: list[dict[str, Any]] = []
    for machine, (cards, _) in MACHINES.items():
        for key, (title, setup) in SCHEMES.items():
            if key in ALONE and cards > 1:
                continue
            # Frozen features save nothing for the backward, under any policy.
            counted = policies[:1] if key == "probe" else policies
            made = {p: of.estimate(setup, p, cluster(machine), RESERVE) for p in counted}
            images = {p: e.largest_batch for p, e in made.items()}
            if not any(images.values()):
                continue
            held = made[counted[0]].states
            states = {"states_bytes": held.gpu, "host_bytes": held.cpu, "disk_bytes": held.disk}
            found.append({"machine": machine, "scheme": title, **states, "images": images})
    return found
