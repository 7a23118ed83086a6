"""Initialisation of ViT-22B's weights, parameter by parameter and shard by shard.

Every block of 64 rows of a parameter is drawn from its own generator, seeded by (seed, parameter,
block). A rank draws only the blocks that its shard covers, so no process holds the whole model. The
weights are the same on 1 rank and on 1000, under FSDP, tensor parallelism and ZeRO-3.

The distributions are big_vision's for a ViT: Xavier uniform for kernels of attention and MLP (each
part of a fused kernel by its own fans), 1e-6 for MLP biases, 1/sqrt(D) for the position embedding,
0 for the classifier with bias -10, so that all sigmoids start near 0. The initialisation of ViT-22B
itself is not published.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ROWS = 64


@torch.no_grad()
def initialise(model: VisionTransformer, seed: int, head_bias: float = -10.0) -> None:
    """Fill all parameters of a model. Every rank must call this with the same seed.

    Args:
        model: with plain parameters, DTensors (this rank's shard is filled), or DeepSpeed's
            partitioned parameters (gathered one at a time).
        seed: of all weights.
        head_bias: bias of the classifier; default -10.
    Raises:
        ValueError: a parameter is on the meta device.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device; allocate it with model.to_empty(device=...)"
            )
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if parameter.numel():
                    _fill(
                        model, name, parameter.data, tuple(parameter.shape), (0, 0), seed, head_bias
                    )
            continue
        value, offset = _shard(parameter)
        _fill(model, name, value, tuple(parameter.shape), offset, seed, head_bias)


def _fill(
    model: VisionTransformer,
    name: str,
    value: Tensor,
    shape: tuple[int, ...],
    offset: tuple[int, int],
    seed: int,
    head_bias: float,
) -> None:
    """Write the part of a parameter of `shape` that begins at row and column `offset`."""
    kind, size = _distribution(name, shape, head_bias)
    if kind == "constant":
        value.fill_(size)
        return
    # (rows, columns): a vector is one column; all dims after the first are columns.
    matrix_shape = (shape[0], math.prod(shape[1:])) if shape[0] > 1 else (math.prod(shape), 1)
    part = value.reshape(value.shape[0], -1) if shape[0] > 1 else value.reshape(-1, 1)
    bounds = _bounds(model, name, size)
    first, column = offset
    for start in range(first - first % ROWS, first + len(part), ROWS):
        rows = min(ROWS, matrix_shape[0] - start)
        drawn = _draw(kind, seed, name, start // ROWS, rows, matrix_shape[1])
        if isinstance(bounds, Tensor):
            drawn = drawn * (bounds[start : start + rows] if bounds.shape[1] == 1 else bounds)
        else:
            drawn = drawn * bounds
        low, high = max(start, first), min(start + rows, first + len(part))
        if high > low:
            values = drawn[low - start : high - start, column : column + part.shape[1]]
            part[low - first : high - first] = values.to(part.device, part.dtype)
    if part.data_ptr() != value.data_ptr():
        value.copy_(part.view_as(value))


def _draw(kind: str, seed: int, name: str, block: int, rows: int, columns: int) -> Tensor:
    """Draw (rows, columns) in float32: uniform in -1 to 1, or normal."""
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if kind == "normal":
        return torch.randn(rows, columns, generator=stream, device="cpu")
    return torch.rand(rows, columns, generator=stream, device="cpu").mul_(2).sub_(1)


def _distribution(name: str, shape: tuple[int, ...], head_bias: float) -> tuple[str, float]:
    """The kind and the size of a parameter's distribution.

    The pairs are ("constant", value), ("normal", deviation) and ("uniform", bound).
    """
    last = name.rpartition(".")[2]
    if name.startswith("head."):
        return "constant", 0.0 if last == "weight" else head_bias
    if "norm" in name:
        return "constant", 1.0 if last == "weight" else 0.0
    if name == "pos_embed":
        return "normal", shape[-1] ** -0.5
    if last == "latent":
        return "uniform", math.sqrt(6 / (shape[-2] + shape[-1]))
    if (
        last == "mlp_bias"
        or (".mlp.fc" in name and last == "bias")
        or name.endswith("out_proj.bias")
    ):
        return "normal", 1e-6
    if last == "bias":
        return "constant", 0.0
    if name.startswith("patch_embed"):
        return "normal", math.prod(shape[1:]) ** -0.5
    # kv consists of two square kernels.
    fan_out = shape[0] // 2 if name.endswith(".kv.weight") else shape[0]
    return "uniform", math.sqrt(6 / (fan_out + math.prod(shape[1:])))


def _bounds(model: VisionTransformer, name: str, size: float) -> float | Tensor:
    """The factor of each row (rows, 1) or column (1, columns): fused kernels have two fans."""
    if not name.endswith(("in_proj.weight", "out_proj.weight")):
        return size
    dim = model.embed_dim
    block = model.blocks[0]
    head_dim, share = block.in_proj.head_dim, block.in_proj.share
    hidden = share * (dim // head_dim)
    square, wide = math.sqrt(6 / (2 * dim)), math.sqrt(6 / (dim + hidden))
    attention = 3 * head_dim if name.endswith("in_proj.weight") else head_dim
    group = torch.tensor([square] * attention + [wide] * share, device="cpu")
    factors = group.repeat(dim // head_dim)
    return factors[:, None] if name.endswith("in_proj.weight") else factors[None, :]


def _shard(parameter: nn.Parameter) -> tuple[Tensor, tuple[int, int]]:
    """This rank's part of a parameter, and the part's first row and column in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter.data, (0, 0)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placed: Any = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    offset = placed[1]
    # After the first dim, only a matrix is sharded (a kernel's columns under tensor parallelism).
    if parameter.shape[0] == 1:
        offset = (offset[0], 0)
    return parameter.to_local(), (offset[0], offset[1] if len(offset) == 2 else 0)
