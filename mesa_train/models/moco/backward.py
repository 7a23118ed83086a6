"""A step of MoCo v3 in half the activations or less, with exact gradients.

Keys need no gradient. Therefore the momentum encoder runs first, without a graph, and then each
view's forward and backward in turn: the activations of one view exist at a time. Loss, gradients
and running statistics are bit-identical to those of the joint step.

With `chunk`, the trunk of each view runs in chunks of images (gradient caching, arXiv 2101.06983),
at the cost of one more forward. The heads have batch norms and the loss has negatives, so both see
the full batch: only the trunk, in which images do not interact, is cut. Two usual ways are wrong:
micro-batches (gradient accumulation) change negatives and statistics, and caching at the queries
changes the statistics of the heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .model import MoCo, moco_loss


def backward_by_view(
    model: MoCo,
    x1: Tensor,
    x2: Tensor,
    momentum: float,
    *,
    chunk: int | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Tensor:
    """Update the momentum encoder and accumulate the gradients of the loss of two views.

    The gradients are those of this rank's loss; the mean over ranks is the gradient of the global
    batch (`average_gradients`).

    Args:
        model: in train mode.
        x1: (N, C, H, W), the first view.
        x2: (N, C, H, W), the second view of the same images.
        momentum: share of the momentum encoder that stays, in [0, 1].
        chunk: images of a trunk forward; default: all. The trunk must have no batch norm.
        autocast: context of the forwards; default: none.
        scale: multiplies a loss before its backward, as `GradScaler.scale` does.
    Returns:
        The loss, without a graph and not scaled.
    Raises:
        ValueError: `chunk` is below 1, or the trunk has a batch norm.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if chunk is not None and model.trunk_has_batch_norm():
        raise ValueError(
            "chunk: the trunk has batch norms, and chunks of images would change their statistics; "
            "leave chunk out for this encoder"
        )
    model.update_momentum(momentum)
    with torch.no_grad(), autocast():
        keys = [_keys(model, x, chunk) for x in (x1, x2)]
    total = x1.new_zeros(())
    for view, key in ((x1, keys[1]), (x2, keys[0])):
        if chunk is None:
            with autocast():
                loss = moco_loss(model.query(view), key, model.temperature)
            scale(loss).backward()
        else:
            loss = _backward_in_chunks(model, view, key, chunk, autocast, scale)
        total = total + loss.detach()
    return total


def features_in_chunks(
    model: MoCo, encoder: nn.Module, x: Tensor, chunk: int
) -> tuple[Tensor, list[Any]]:
    """Features (N, width) without a graph, in chunks, and the random states before each chunk."""
    features, states = [], []
    with torch.no_grad():
        for part in x.split(chunk):
            states.append(_random_state(x.device))
            features.append(model.features(encoder, part))
    return torch.cat(features), states


def _keys(model: MoCo, x: Tensor, chunk: int | None) -> Tensor:
    """Keys of a view: the momentum trunk in chunks, its projector on the full batch."""
    if chunk is None:
        return model.key(x)
    return model.key_of(features_in_chunks(model, model.momentum_encoder, x, chunk)[0])


def _backward_in_chunks(
    model: MoCo,
    x: Tensor,
    keys: Tensor,
    chunk: int,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    scale: Callable[[Tensor], Tensor],
) -> Tensor:
    """One view: heads on the full batch, then the trunk again by chunks with their gradients."""
    with autocast():
        features, states = features_in_chunks(model, model.base_encoder, x, chunk)
        features.requires_grad_()
        loss = moco_loss(model.query_of(features), keys, model.temperature)
    scale(loss).backward()
    assert features.grad is not None
    with _keeping_random_state(x.device):
        for part, state, grad in zip(
            x.split(chunk), states, features.grad.split(chunk), strict=True
        ):
            _restore(x.device, state)
            with autocast():
                again = model.features(model.base_encoder, part)
            again.backward(grad)
    return loss


def average_gradients(model: nn.Module) -> None:
    """Replace all gradients by their mean over ranks.

    The ranks' gradients travel in one buffer for each dtype, so a step has one collective for each.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for p in model.parameters():
        if p.grad is not None:
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
    for grads in by_dtype.values():
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


def _random_state(device: torch.device) -> Any:
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), gpu


def _restore(device: torch.device, state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextlib.contextmanager
def _keeping_random_state(device: torch.device) -> Any:
    """Restore the generators at the end: the second forward draws what the first one drew."""
    state = _random_state(device)
    try:
        yield
    finally:
        _restore(device, state)
