"""The fit of EcoFormer's hashes: an explicit call before the training, on one batch of images.

For each attention layer, in the order of the forward:

1. The anchors are m tokens of the first image, drawn by `seed`. `mvec` is the mean kernel value.
2. The targets S0 are +1 for the `topk` most similar tokens of each token, -1 for the `topk` least
   similar tokens, else 0. S = bits * S0.
3. For each bit, 100 steps of SGD minimise L = -mean(y^T S y) / (N bits), y = 2 sigmoid(K a) - 1.
   The new a is kept if the loss of its hard codes h, -1 and 1, is lower. Then S = S - h h^T.

S is never formed: y^T S y = bits * y^T S0 y - sum over earlier bits of (y . h)^2, and S0 has 20
entries a row. The authors' code holds two tensors of B * heads * N * N elements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mesa_train.models.lit.deformable_merging import without_autocast

from .attention import EcoFormerAttention
from .hashing import KernelHash, kernel_values


class HashFit(NamedTuple):
    """The result of the fit of one hash.

    Attributes:
        first_loss, last_loss: soft loss of each bit before the first and before the last step.
        accepted: for each bit, whether the fitted weights replaced the former weights.
    """

    first_loss: Tensor
    last_loss: Tensor
    accepted: Tensor


class _Targets:
    """y^T S y for the targets S of one layer, which change with each bit."""

    def __init__(self, x: Tensor, bits: int, topk: int) -> None:
        most, least = [], []
        for vectors in x:  # one image at a time, to hold one (heads, N, N) only
            similarity = vectors @ vectors.transpose(-2, -1)
            most.append(similarity.topk(topk, dim=-1).indices)
            least.append(similarity.topk(topk, dim=-1, largest=False).indices)
        self.most, self.least = torch.stack(most), torch.stack(least)
        # A token in both lists counts as least similar.
        both = (self.most.unsqueeze(-1) == self.least.unsqueeze(-2)).any(-1)
        self.weight = (~both).to(x.dtype)
        self.bits = bits
        self.codes: list[Tensor] = []

    def form(self, y: Tensor) -> Tensor:
        """y^T S y of y (B, heads, N), for each image and head."""
        near = (self._gather(y, self.most) * self.weight).sum(-1)
        far = self._gather(y, self.least).sum(-1)
        total = self.bits * (y * (near - far)).sum(-1)
        for code in self.codes:
            total = total - (y * code).sum(-1).square()
        return total

    def loss(self, y: Tensor) -> Tensor:
        """The loss L of y (B, heads, N)."""
        return -(self.form(y) / (y.shape[-1] * self.bits)).mean()

    @staticmethod
    def _gather(y: Tensor, indices: Tensor) -> Tensor:
        return y.gather(-1, indices.flatten(-2)).unflatten(-1, indices.shape[-2:])


def fit_hash(
    ksh: KernelHash,
    x: Tensor,
    anchors: Tensor,
    *,
    topk: int = 10,
    steps: int = 100,
    lr: float = 5e-4,
    momentum: float = 0.9,
) -> HashFit:
    """Fit one hash in place.

    Args:
        ksh: the hash.
        x: unit vectors (B, heads, N, head_dim), at least float32.
        anchors: positions (m,) of the anchors among the tokens of the first image.
        topk: similar and dissimilar tokens of each token; default 10.
        steps: of SGD for each bit; default 100.
        lr: learning rate; default 5e-4.
        momentum: of Nesterov's method; default 0.9.
    Raises:
        ValueError: there are fewer than m or than `topk` tokens.
        RuntimeError: the weights of a bit are no longer finite.
    """
    tokens = x.shape[2]
    if tokens < max(ksh.anchors, topk):
        raise ValueError(
            f"a hash needs at least {max(ksh.anchors, topk)} tokens, got {tokens}; take larger images"
        )
    x = x.detach()
    ksh.anchor.copy_(x[0][:, anchors])
    values = kernel_values(x, ksh.anchor.to(x))
    mean = values.mean((0, 2), keepdim=True)
    ksh.mvec.copy_(mean)
    values = values - mean
    targets = _Targets(x, ksh.bits, topk)
    first, last, accepted = [], [], []
    for bit in range(ksh.bits):
        start = ksh.A[:, bit].to(x)
        weights, losses = _descend(values, start, targets, steps, lr, momentum)
        if not weights.isfinite().all():
            raise RuntimeError(
                f"the weights of bit {bit} are not finite; take a lower lr than {lr}"
            )
        new, old = _codes(values, weights), _codes(values, start)
        better = bool(targets.loss(new) < targets.loss(old))
        if better:
            ksh.A[:, bit] = weights.to(ksh.A)
        targets.codes.append(new if better else old)
        first.append(losses[0])
        last.append(losses[-1])
        accepted.append(better)
    return HashFit(torch.stack(first), torch.stack(last), torch.tensor(accepted))


def _descend(
    values: Tensor, start: Tensor, targets: _Targets, steps: int, lr: float, momentum: float
) -> tuple[Tensor, list[Tensor]]:
    """Minimise the soft loss of one bit: (weights (heads, m), the loss before each step)."""
    with torch.enable_grad():
        weights = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([weights], lr=lr, momentum=momentum, nesterov=True)
        losses = []
        for _ in range(steps):
            loss = targets.loss(2 * (values @ weights.unsqueeze(-1)).squeeze(-1).sigmoid() - 1)
            optimizer.zero_grad()
            (weights.grad,) = torch.autograd.grad(loss, weights)
            optimizer.step()
            losses.append(loss.detach())
    return weights.detach(), losses


def _codes(values: Tensor, weights: Tensor) -> Tensor:
    """Hard codes (B, heads, N): 1 where the score is positive, else -1."""
    positive = (values @ weights.unsqueeze(-1)).squeeze(-1) > 0
    return torch.where(positive, 1.0, -1.0).to(values.dtype)


def fit_hashes(
    model: nn.Module, batch: Tensor, *, seed: int = 0, topk: int = 10, steps: int = 100
) -> list[HashFit]:
    """Fit all hashes of a model in place, layer by layer, on the same images.

    The parameters do not change. The result depends on `seed` alone, and not on the state of
    torch's generators. In a distributed run every rank must call it: rank 0 fits, and its hashes
    are sent to the other ranks. A state dict holds the fitted hashes.

    Args:
        model: with `EcoFormerAttention` layers.
        batch: images (B, C, H, W), on the model's device; every hashed stage needs 25 tokens.
        seed: of the anchors' positions; default 0.
        topk: similar and dissimilar tokens of each token; default 10.
        steps: of SGD for each bit; default 100.
    Returns:
        The fit of each layer, in the order of the forward. Empty on ranks other than 0.
    Raises:
        ValueError: the model has no such layer, or the images are too small.
    """
    layers = [m for m in model.modules() if isinstance(m, EcoFormerAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no EcoFormerAttention layer to fit")
    distributed = dist.is_available() and dist.is_initialized()
    fits: list[HashFit] = []
    if not distributed or dist.get_rank() == 0:
        before = [{k: b.clone() for k, b in _buffers(layer)} for layer in layers]
        try:
            fits = _fit_layers(model, layers, batch, seed, topk, steps)
        except Exception:
            for layer, buffers in zip(layers, before, strict=True):
                for key, buffer in _buffers(layer):
                    buffer.copy_(buffers[key])
            raise
    if distributed:
        for layer in layers:
            for _, buffer in _buffers(layer):
                dist.broadcast(buffer, src=0)
    return fits


def hashes_fitted(model: nn.Module) -> bool:
    """True if all hashes of a model are fitted, by `fit_hashes` or by a state dict."""
    return all(m.fitted for m in model.modules() if isinstance(m, KernelHash))


def _buffers(layer: EcoFormerAttention) -> Iterator[tuple[str, Tensor]]:
    return iter(layer.fast_attention.ksh.named_buffers())


def _fit_layers(
    model: nn.Module,
    layers: list[EcoFormerAttention],
    batch: Tensor,
    seed: int,
    topk: int,
    steps: int,
) -> list[HashFit]:
    """Fit each layer just before its forward, so that later layers see the fitted outputs."""
    fits: list[HashFit] = []

    def fit(layer: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(layer, EcoFormerAttention)
        x = layer.unit_vectors(args[0])
        generator = torch.Generator().manual_seed(seed + len(fits))
        ksh = layer.fast_attention.ksh
        anchors = torch.randperm(x.shape[2], generator=generator)[: ksh.anchors].to(x.device)
        with without_autocast(x.device.type):
            fits.append(fit_hash(ksh, x, anchors, topk=topk, steps=steps))

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(fit).remove)
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        stack.enter_context(torch.no_grad())
        model(batch)
    return fits
