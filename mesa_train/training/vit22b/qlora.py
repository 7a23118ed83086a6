"""QLoRA for ViT-22B: a frozen model in 4 bits with low-rank adapters (arXiv 2305.14314).

Every large matrix is stored as NF4 codes of bitsandbytes: 4 bits an element, and a byte for every
64 with double quantisation, 0.52 bytes in total. The codes are decoded in the forward and again in
the backward. No input of a frozen matrix is saved.

The trained parameters are float32: adapters W + (alpha / rank) B A at the two fused matmuls of each
block and at the matmuls of the pooling head, and the classifier.

The weights are read and encoded one matrix at a time. Host and card therefore hold at most one
whole matrix: 0.5 GiB for ViT-22B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.training import disk
from mesa_train.training.disk import CheckpointError

from .checkpoint import files_of

BLOCK = 64
# A smaller matrix stays in bfloat16: the patch embedding of the small models.
LEAST = 4096


class Nf4Weight(nn.Module):
    """A frozen matrix in 4 bits with an adapter.

    It maps x (..., in) and a bias (out,) or None to x W^T + bias + scale (x A^T) B^T.

    Args:
        weight: (out, in), on any device.
        rank: of the adapter.
        alpha: scale = alpha / rank.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.codes: Tensor
        self.state: Any
        functional = _bitsandbytes().functional
        codes, self.state = functional.quantize_4bit(
            weight.detach().to(torch.bfloat16),
            quant_type="nf4",
            blocksize=BLOCK,
            compress_statistics=True,
        )
        self.register_buffer("codes", codes, persistent=False)
        self.scale = alpha / rank
        rows, columns = weight.shape
        # The initial values of LoRA: A random, B zero, so that the product is unchanged at first.
        self.a = nn.Parameter(torch.randn(rank, columns, device=weight.device) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        frozen = x.to(torch.bfloat16)
        y: Tensor = _bitsandbytes().matmul_4bit(frozen, self.codes.t(), quant_state=self.state)
        if bias is not None:
            y = y + bias.to(y.dtype)
        low = F.linear(F.linear(frozen, self.a.to(y.dtype)), self.b.to(y.dtype))
        return y + self.scale * low

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + scale B A in float32, with W decoded from the codes."""
        weight = _bitsandbytes().functional.dequantize_4bit(self.codes, self.state).float()
        return weight + self.scale * self.b @ self.a

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the codes and their scales."""
        second = self.state.state2
        return sum(t.nbytes for t in (self.codes, self.state.absmax, second.absmax))


class Adapted(nn.Module):
    """A Linear of the pooling head in 4 bits, with a frozen bias."""

    def __init__(self, adapted: Any, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.adapted, self.bias = adapted, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x, self.bias)


def quantised(
    model: Any,
    read: Callable[[str, torch.Size], Tensor],
    device: str | torch.device,
    *,
    rank: int = 16,
    alpha: float = 32.0,
) -> Any:
    """Give a model on the meta device its weights in place, so that adapters and classifier train.

    Matrices become NF4, other parameters frozen bfloat16, the classifier float32.

    Args:
        model: on the meta device.
        read: from a parameter's name and shape to its weights: `reader` for files, `random_weights`
            for a trial.
        device: of the weights.
        rank: of the adapters; default 16.
        alpha: of the adapters; default 32.
    Raises:
        ValueError: the model is not on the meta device.
        CheckpointError: from `read`.
    """
    if not all(p.is_meta for p in model.parameters()):
        raise ValueError("build the model under torch.device('meta'): it is read layer by layer")
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{key}" if name else key
            value = read(full, parameter.shape)
            if tuple(value.shape) != tuple(parameter.shape):
                raise CheckpointError(
                    f"{full} is {tuple(value.shape)}, not {tuple(parameter.shape)}"
                )
            value = value.to(device)
            if name == "head":
                setattr(module, key, nn.Parameter(value.float()))
            elif is_adapted(full, value.shape):
                del module.weight
                module.adapted = Nf4Weight(value, rank, alpha)
            else:
                frozen = nn.Parameter(value.to(torch.bfloat16), requires_grad=False)
                setattr(module, key, frozen)
            del value
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "head" and hasattr(module, "adapted"):
            setattr(
                model.get_submodule(name.rpartition(".")[0]),
                name.rpartition(".")[2],
                Adapted(module.adapted, module.bias),
            )
    return model


def is_adapted(name: str, shape: torch.Size) -> bool:
    """True if a parameter becomes NF4 with an adapter: a large matrix, not the classifier."""
    of, _, key = name.rpartition(".")
    return of != "head" and key == "weight" and len(shape) == 2 and shape.numel() >= LEAST


def reader(source: Path) -> Callable[[str, torch.Size], Tensor]:
    """A function that reads single parameters of consolidated weights (`checkpoint.export`)."""
    from safetensors import safe_open

    files = files_of(source)
    if not files:
        with disk.reading(source), safe_open(source, "pt") as file:
            files = dict.fromkeys(file.keys(), source)

    def read(name: str, shape: torch.Size) -> Tensor:
        if name not in files:
            raise CheckpointError(f"{source} has no {name}")
        with disk.reading(files[name]), safe_open(files[name], "pt") as file:
            found = tuple(file.get_slice(name).get_shape())
            if found != tuple(shape):
                raise CheckpointError(f"{source}: {name} is {found}, not {tuple(shape)}")
            return file.get_tensor(name)

    return read


def random_weights(seed: int, device: str | torch.device) -> Callable[[str, torch.Size], Tensor]:
    """A function that draws weights for a trial without a checkpoint.

    Gains are 1, biases 0, all others normal with deviation 1/sqrt(in).
    """
    stream = torch.Generator(device).manual_seed(seed)

    def read(name: str, shape: torch.Size) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, device=device)
        if len(shape) < 2:
            return torch.zeros(shape, device=device)
        value = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=stream)
        return value * shape[1:].numel() ** -0.5

    return read


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters by name: the adapters and the classifier."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _bitsandbytes() -> Any:
    """Import bitsandbytes. ImportError with the remedy if it is missing."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "4-bit weights need bitsandbytes; pip install 'mesa_train[bitsandbytes]'"
        ) from error
    return bitsandbytes
