"""Conversion of ViT-22B's weights from and to other layouts.

The layouts are one matrix for each projection, timm's `ParallelScalingBlock`, and Flax.

Our layout fuses the projections and groups rows and columns by head (`model.py`). The functions
here are exact permutations, with one exception. timm's unfused block has a bias after each of its
two output projections, and only the sum of both matters. `to_timm` therefore writes the sum as the
MLP's bias, and zeros as attention's.

All functions take a mapping and yield (name, tensor) pairs one at a time. With a mapping that reads
lazily, they convert a model larger than the memory. Names outside the blocks are timm's in every
layout except Flax's.

The plain layout has for each block: norm, q, k, v, q_norm, k_norm, fc1, proj, fc2 (weights; biases
of fc1 and fc2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Pairs = Iterator[tuple[str, Tensor]]
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def from_plain(state: Mapping[str, Tensor], num_heads: int) -> Pairs:
    """Convert from one matrix for each projection.

    Raises:
        ValueError: names a parameter that is missing or has the wrong shape.
    """
    yield from _outside(state)
    for block in _blocks(state):
        take = _Taker(state, block, num_heads)
        yield block + "in_norm.weight", take("norm.weight")
        yield from _head_norms(state, block)
        rows = [take.rows(f"{name}.weight") for name in ("q", "k", "v", "fc1")]
        yield block + "in_proj.weight", torch.cat(rows, 1).flatten(0, 1)
        yield block + "in_proj.mlp_bias", take("fc1.bias")
        columns = [take.columns(f"{name}.weight") for name in ("proj", "fc2")]
        yield block + "out_proj.weight", torch.cat(columns, 2).flatten(1)
        yield block + "out_proj.bias", take("fc2.bias")


def to_plain(state: Mapping[str, Tensor], num_heads: int) -> Pairs:
    """Convert to one matrix for each projection; the inverse of `from_plain`."""
    yield from _outside(state)
    for block in _blocks(state):
        take = _Taker(state, block, num_heads)
        yield block + "norm.weight", take("in_norm.weight")
        yield from _head_norms(state, block)
        for name, part in zip(("q", "k", "v", "fc1"), _input_parts(take), strict=True):
            yield f"{block}{name}.weight", part
        yield block + "fc1.bias", take("in_proj.mlp_bias")
        for name, part in zip(("proj", "fc2"), _output_parts(take), strict=True):
            yield f"{block}{name}.weight", part
        yield block + "fc2.bias", take("out_proj.bias")


def from_timm(state: Mapping[str, Tensor], num_heads: int) -> Pairs:
    """Convert from timm's `ParallelScalingBlock`, with the output projection fused or not.

    Raises:
        ValueError: the block has a QKV bias, or a parameter is missing.
    """
    yield from _outside(state)
    for block in _blocks(state):
        take = _Taker(state, block, num_heads)
        if block + "in_proj.bias" in state:
            raise ValueError(f"{block}in_proj.bias: ViT-22B has no bias of q, k and v")
        yield block + "in_norm.weight", take("in_norm.weight")
        yield from _head_norms(state, block)
        weight = take("in_proj.weight")
        dim = weight.shape[1]
        parts = weight.split([len(weight) - 3 * dim, dim, dim, dim])
        rows = [part.unflatten(0, (num_heads, -1)) for part in (*parts[1:], parts[0])]
        yield block + "in_proj.weight", torch.cat(rows, 1).flatten(0, 1)
        yield block + "in_proj.mlp_bias", take("mlp_bias")
        if block + "out_proj.weight" in state:
            weight, bias = take("out_proj.weight"), take("out_proj.bias")
            halves = weight.split([dim, weight.shape[1] - dim], 1)
        else:
            halves = (take("attn_out_proj.weight"), take("mlp_out_proj.weight"))
            bias = take("attn_out_proj.bias") + take("mlp_out_proj.bias")
        columns = [half.unflatten(1, (num_heads, -1)) for half in halves]
        yield block + "out_proj.weight", torch.cat(columns, 2).flatten(1)
        yield block + "out_proj.bias", bias


def to_timm(state: Mapping[str, Tensor], num_heads: int, fuse_out_proj: bool = False) -> Pairs:
    """Convert to timm's `ParallelScalingBlock(qkv_bias=False, fuse_out_proj=...)`."""
    yield from _outside(state)
    for block in _blocks(state):
        take = _Taker(state, block, num_heads)
        yield block + "in_norm.weight", take("in_norm.weight")
        yield from _head_norms(state, block)
        q, k, v, hidden = _input_parts(take)
        yield block + "in_proj.weight", torch.cat([hidden, q, k, v])
        yield block + "mlp_bias", take("in_proj.mlp_bias")
        halves, bias = _output_parts(take), take("out_proj.bias")
        if fuse_out_proj:
            yield block + "out_proj.weight", torch.cat(halves, 1)
            yield block + "out_proj.bias", bias
        else:
            for name, half in zip(("attn_out_proj", "mlp_out_proj"), halves, strict=True):
                yield f"{block}{name}.weight", half
            yield block + "attn_out_proj.bias", torch.zeros_like(bias)
            yield block + "mlp_out_proj.bias", bias


def from_flax(params: Mapping[str, Any], num_heads: int) -> Pairs:
    """Convert from a flat mapping of arrays, with the names of Flax and big_vision for a ViT.

    A name is such as `Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel`.
    Kernels are (in, out) or (in, heads, head_dim). ViT-22B's own checkpoint is not public. The
    names in its parallel block are therefore assumed: the names of the parts of the block.

    Raises:
        ValueError: a name is unknown.
    """
    arrays = {name.removeprefix("params/"): _tensor(value) for name, value in params.items()}
    plain: dict[str, Tensor] = {}
    for name, value in arrays.items():
        for pattern, target in _FLAX:
            match = re.fullmatch(pattern, name)
            if match:
                key = match.expand(target)
                plain[key] = value if value.dim() == 1 else _kernel(key, value)
                break
        else:
            raise ValueError(f"{name!r} is not a parameter of a ViT-22B in Flax")
    pooling = {k: plain.pop(f"attn_pool.{k}.weight", None) for k in ("key", "value")}
    biases = {k: plain.pop(f"attn_pool.{k}.bias", None) for k in ("key", "value")}
    if all(v is not None for v in pooling.values()):
        plain["attn_pool.kv.weight"] = torch.cat(list(pooling.values()))  # type: ignore[arg-type]
    if all(v is not None for v in biases.values()):
        plain["attn_pool.kv.bias"] = torch.cat(list(biases.values()))  # type: ignore[arg-type]
    yield from from_plain(plain, num_heads)


_IN = r"Transformer/encoderblock_(\d+)/"
_ATTENTION, _MLP = r"MultiHeadDotProductAttention_0/", r"MlpBlock_0/"
_POOL = r"MAPHead_0/"
_KIND = {"kernel": "weight", "bias": "bias"}
_FLAX: list[tuple[str, str]] = [
    (_IN + "LayerNorm_0/scale", r"blocks.\1.norm.weight"),
    *[
        (f"{_IN}{_ATTENTION}{theirs}/kernel", rf"blocks.\1.{ours}.weight")
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "proj"))
    ],
    (f"{_IN}{_ATTENTION}query_ln/scale", r"blocks.\1.q_norm.weight"),
    (f"{_IN}{_ATTENTION}key_ln/scale", r"blocks.\1.k_norm.weight"),
    *[
        (f"{_IN}{_MLP}Dense_{i}/{kind}", rf"blocks.\1.fc{i + 1}.{ours}")
        for i in range(2)
        for kind, ours in _KIND.items()
    ],
    ("Transformer/encoder_norm/scale", "norm.weight"),
    (_POOL + "probe", "attn_pool.latent"),
    *[
        (f"{_POOL}{_ATTENTION}{theirs}/{kind}", f"attn_pool.{ours}.{_KIND[kind]}")
        for theirs, ours in (("query", "q"), ("key", "key"), ("value", "value"), ("out", "proj"))
        for kind in _KIND
    ],
    (_POOL + "LayerNorm_0/scale", "attn_pool.norm.weight"),
    *[
        (f"{_POOL}{_MLP}Dense_{i}/{kind}", f"attn_pool.mlp.fc{i + 1}.{ours}")
        for i in range(2)
        for kind, ours in _KIND.items()
    ],
    *[(f"embedding/{kind}", f"patch_embed.proj.{ours}") for kind, ours in _KIND.items()],
    *[(f"head/{kind}", f"head.{ours}") for kind, ours in _KIND.items()],
    ("pos_embedding", "pos_embed"),
]


def _kernel(key: str, value: Tensor) -> Tensor:
    """Convert a Flax kernel to a torch weight."""
    if key in ("pos_embed", "attn_pool.latent"):
        return value
    if key == "patch_embed.proj.weight":  # (h, w, in, out)
        return value.permute(3, 2, 0, 1).contiguous()
    if key.endswith((".proj.weight",)):  # (heads, head_dim, out)
        return value.flatten(0, -2).t().contiguous()
    if key.endswith(".bias"):  # (heads, head_dim)
        return value.flatten()
    return value.flatten(1).t().contiguous()


def _tensor(value: Any) -> Tensor:
    """Convert an array to a tensor."""
    return value if isinstance(value, Tensor) else torch.from_numpy(value)


class _Taker:
    """Reads the parameters of one block, whole or split by head."""

    def __init__(self, state: Mapping[str, Tensor], block: str, num_heads: int) -> None:
        self.state, self.block, self.num_heads = state, block, num_heads

    def __call__(self, name: str) -> Tensor:
        key = self.block + name
        if key not in self.state:
            raise ValueError(f"{key} is missing")
        return self.state[key]

    def rows(self, name: str) -> Tensor:
        """Split by rows: (heads, rows of a head, columns)."""
        return self._by_head(name, 0)

    def columns(self, name: str) -> Tensor:
        """Split by columns: (rows, heads, columns of a head)."""
        return self._by_head(name, 1)

    def _by_head(self, name: str, dim: int) -> Tensor:
        """Split a matrix by head along `dim`. ValueError if it does not divide."""
        value = self(name)
        if value.dim() != 2 or value.shape[dim] % self.num_heads:
            raise ValueError(
                f"{self.block}{name} of shape {tuple(value.shape)} does not split into "
                f"{self.num_heads} heads"
            )
        return value.unflatten(dim, (self.num_heads, -1))


def _input_parts(take: _Taker) -> list[Tensor]:
    """q, k, v and the MLP's part of our first matmul, each (rows, dim) in the order of heads."""
    rows = take.rows("in_proj.weight")
    head_dim = rows.shape[2] // take.num_heads
    parts = rows.split([head_dim] * 3 + [rows.shape[1] - 3 * head_dim], 1)
    return [part.flatten(0, 1) for part in parts]


def _output_parts(take: _Taker) -> list[Tensor]:
    """Attention's and the MLP's part of our second matmul, each (dim, columns)."""
    columns = take.columns("out_proj.weight")
    head_dim = columns.shape[0] // take.num_heads
    parts = columns.split([head_dim, columns.shape[2] - head_dim], 2)
    return [part.flatten(1) for part in parts]


def _head_norms(state: Mapping[str, Tensor], block: str) -> Pairs:
    """The norms of queries and keys, if there are any."""
    for name in ("q_norm.weight", "k_norm.weight"):
        if block + name in state:
            yield block + name, state[block + name]


def _outside(state: Mapping[str, Tensor]) -> Pairs:
    """The parameters outside the blocks."""
    for name in state:
        if not _BLOCK.match(name):
            yield name, state[name]


def _blocks(state: Mapping[str, Tensor]) -> list[str]:
    """The prefixes `blocks.N.` in order. ValueError if there are none."""
    numbers = sorted({int(m[1]) for m in map(_BLOCK.match, state) if m})
    if not numbers:
        raise ValueError("no parameter is named blocks.N.*: the weights are not a ViT-22B's")
    return [f"blocks.{n}." for n in numbers]
