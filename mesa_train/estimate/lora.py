"""Change a model as NF4 + LoRA does, for counting: frozen 4-bit Linears with small trained ones.

It is for the meta device. The shapes and the saved tensors are equal to QLoRA's (arXiv 2305.14314);
the model cannot run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements that share an 8-bit scale, and scales that share a float32 scale: QLoRA's double
# quantisation.
_BLOCK, _BLOCKS = 64, 256


class Lora(nn.Module):
    """y = W x + bias + B A x with W (out, in) frozen in 4 bits."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.weight = weight
        rows, columns = weight.shape
        self.lora_a = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        self.lora_b = nn.Parameter(torch.empty(rows, rank, device=weight.device))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = _Frozen.apply(x, self.weight)
        y = y if bias is None else y + bias
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b)


class LoraLinear(nn.Module):
    """A Linear with LoRA; its weight and bias are frozen."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.product, self.bias = Lora(linear.weight, rank), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


class _Frozen(torch.autograd.Function):
    """The product with a frozen weight, which is decoded in the forward and again in the backward.

    No policy recomputes this product, and its input is not saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, torch.empty_like(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ torch.empty_like(weight), None


def with_lora(model: nn.Module, rank: int) -> int:
    """Freeze `model` in place and add LoRA to its Linears.

    Every Linear except the last gets a LoRA, if its weight has more than `rank` rows and columns.
    So does every module with an attribute `adapted` (ViT-22B's fused projections). All parameters of
    the last Linear, the head, are trained.

    Args:
        model: the module.
        rank: rank of LoRA.

    Returns:
        Bytes of the frozen parameters; matrices with a LoRA count as NF4.

    Raises:
        ValueError: the rank is below 1, or the model has fewer than two Linears.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1, got {rank}")
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if len(linears) < 2:
        raise ValueError(f"{type(model).__name__} has fewer than two Linears to put LoRA on")
    head = model.get_submodule(linears[-1])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    nf4_savings = 0
    for module in [module for module in model.modules() if hasattr(module, "adapted")]:
        weight: Any = module.weight
        nf4_savings += nf4_bytes(weight.numel()) - 2 * weight.numel()
        del module.weight
        module.adapted = Lora(weight, rank)
    for name in linears[:-1]:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if min(linear.weight.shape) <= rank:
            continue
        nf4_savings += nf4_bytes(linear.weight.numel()) - 2 * linear.weight.numel()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoraLinear(linear, rank))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return 2 * frozen + nf4_savings


def nf4_bytes(elements: int) -> int:
    """Bytes of NF4 codes with double-quantised scales."""
    scales = -(-elements // _BLOCK)
    return -(-elements // 2) + scales + 4 * -(-scales // _BLOCKS)
