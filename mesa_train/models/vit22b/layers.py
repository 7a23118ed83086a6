"""The parallel block of ViT-22B and its two grouped matmuls."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .sequence_parallel import gathered, scattered

QK_NORMS = ("rms", "layer", "none")


GELUS = ("tanh", "none")


EPS = 1e-6


class GroupedInput(nn.Module):
    """The projections of queries, keys, values and the MLP's hidden in one matmul.

    Input (..., dim). Output: q, k, v (..., heads, head_dim) and m (..., heads, share), views of one
    product.

    Attributes:
        weight: (heads * (3 head_dim + share), dim), grouped by head; may be a shard of whole heads.
        mlp_bias: (heads * share,); may be a shard of whole heads.
        mesh: the tensor-parallel ranks that share the heads; None for one rank.
        sequence: whether the tokens of y are sharded over the mesh (`sequence_parallel`).
        adapted: module that computes the product from y and the bias, instead of the weight; or
            None.
    """

    mesh: DeviceMesh | None = None
    sequence = False

    def __init__(self, dim: int, num_heads: int, hidden: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.adapted: nn.Module | None = None
        self.head_dim, self.share = dim // num_heads, hidden // num_heads
        self.weight = nn.Parameter(torch.empty(3 * dim + hidden, dim, **factory_kwargs))
        self.mlp_bias = nn.Parameter(torch.empty(hidden, **factory_kwargs))

    def forward(self, y: Tensor) -> tuple[Tensor, ...]:
        mlp_bias = local(self.mlp_bias)
        if self.mesh is not None and self.sequence:
            y = gathered(y, self.mesh)
        elif self.mesh is not None and y.requires_grad:
            # Each rank has the gradient through its own heads. This is a hook, not a function of y,
            # so that y stays the output of the norm. The matmul shares the stash of that output.
            y.register_hook(partial(summed, mesh=self.mesh))
        # q, k and v have no bias: the zeros cost one row of the output.
        bias = F.pad(mlp_bias.view(-1, self.share), (3 * self.head_dim, 0)).flatten()
        if self.adapted is not None:
            product = self.adapted(y, bias)
        elif self.sequence and torch.compiler.is_compiling():
            # The compiler fuses a gather with a product without a bias, and this sum with its
            # readers.
            product = F.linear(y, local(self.weight)) + bias
        else:
            product = F.linear(y, local(self.weight), bias)
        parts = product.view(*product.shape[:-1], -1, 3 * self.head_dim + self.share)
        return parts.split([self.head_dim] * 3 + [self.share], dim=-1)


class GroupedOutput(nn.Module):
    """The output projections of attention and MLP in one matmul.

    Input: attention's output (..., heads, head_dim) and the activated hidden (..., heads, share).

    Attributes:
        weight: (dim, heads * (head_dim + share)), columns grouped by head.
        bias: (dim,).
        mesh, sequence, adapted: as for `GroupedInput`.
    """

    mesh: DeviceMesh | None = None
    sequence = False

    def __init__(self, dim: int, hidden: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.adapted: nn.Module | None = None
        self.weight = nn.Parameter(torch.empty(dim, dim + hidden, **factory_kwargs))
        self.bias = nn.Parameter(torch.empty(dim, **factory_kwargs))

    def forward(self, attended: Tensor, hidden: Tensor) -> Tensor:
        both = torch.cat([attended, hidden], -1).flatten(-2)
        if self.adapted is not None:
            return self.adapted(both, self.bias)
        if self.mesh is None:
            return F.linear(both, self.weight, self.bias)
        part = F.linear(both, local(self.weight))
        total = scattered(part, self.mesh) if self.sequence else _Sum.apply(part, self.mesh)
        return total + self.bias


class ParallelBlock(nn.Module):
    """One block of ViT-22B: (B, N, dim) to (B, N, dim).

    Args:
        dim: width.
        num_heads: number of heads; must divide `dim` and the MLP's width.
        mlp_ratio: width of the MLP over `dim`; default 4.
        drop_path: drop path rate; default 0.
        qk_norm: "rms" (default), "layer" or "none".
        gelu: "tanh" (default) or "none", the exact form.
        device: of the parameters.
        dtype: of the parameters.
    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        qk_norm: str = "rms",
        gelu: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _choice("qk_norm", qk_norm, QK_NORMS)
        _choice("gelu", gelu, GELUS)
        hidden = int(dim * mlp_ratio)
        if dim % num_heads or hidden % num_heads:
            raise ValueError(
                f"num_heads={num_heads} must divide the width {dim} and the MLP's {hidden}"
            )
        factory_kwargs = {"device": device, "dtype": dtype}
        self.in_norm = nn.RMSNorm(dim, eps=EPS, **factory_kwargs)
        self.in_proj = GroupedInput(dim, num_heads, hidden, **factory_kwargs)
        self.q_norm = _head_norm(qk_norm, dim // num_heads, factory_kwargs)
        self.k_norm = _head_norm(qk_norm, dim // num_heads, factory_kwargs)
        self.act = nn.GELU(approximate=gelu)
        self.out_proj = GroupedOutput(dim, hidden, **factory_kwargs)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, hidden = self.in_proj(self.in_norm(x))
        q, k = self.q_norm(q), self.k_norm(k)
        attended = F.scaled_dot_product_attention(*[t.transpose(-3, -2) for t in (q, k, v)])
        y = self.out_proj(attended.transpose(-3, -2), self.act(hidden))
        return x + self.drop_path(y)


class _Sum(torch.autograd.Function):
    """The sum over the ranks of `mesh`. Its gradient is also the gradient of each rank's part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: DeviceMesh) -> Tensor:  # noqa: ARG004
        return summed(part, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


def summed(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum `part` over the ranks of a one-dimensional mesh, into a new tensor."""
    total = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=mesh.get_group())
    return total


def local(weight: Tensor) -> Tensor:
    """This rank's part of a tensor-parallel weight; any other weight unchanged."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _head_norm(kind: str, head_dim: int, factory_kwargs: dict[str, Any]) -> nn.Module:
    """The norm of queries or keys of a kind."""
    if kind == "rms":
        return nn.RMSNorm(head_dim, eps=EPS, **factory_kwargs)
    return (
        nn.LayerNorm(head_dim, EPS, bias=False, **factory_kwargs)
        if kind == "layer"
        else nn.Identity()
    )


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
