"""`capture_step`: a training step that PyTorch records once and the GPU repeats without Python.

Why: a step of a small model makes thousands of calls of kernels. On a fast GPU the calls take
longer than the kernels. A CUDA graph starts all kernels of a step with one call.

How: the first calls of each shape of a batch are ordinary steps on a side stream. The next call
captures forward, loss and backward, and replays the graph. A second graph, for all shapes, clips the
gradients and steps the optimizer. Every call is one real step, so nothing is trained twice.

Cost: a copy of each batch; memory for the graphs' tensors that no other tensor of the process can
use; seconds for each capture. Status: tested on the CPU without graphs; not run on a GPU.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backend as backends
from .backend import captured
from .checks import (
    DDP_WARMUP,
    check_batch,
    check_model,
    check_optimizer,
    is_ddp,
    the_device,
)
from .gradients import Gradients
from .update import Update

_log = logging.getLogger("mesa_train")
_WARMUP = 3


def capture_step(
    model: nn.Module,
    loss: Callable[..., Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    optimizer_in_graph: bool | None = None,
    warmup: int | None = None,
    max_graphs: int = 8,
) -> CapturedStep:
    """Make a training step that runs as CUDA graphs: `loss = step(images, labels)`.

    A call is one micro-batch: forward, loss, backward. The call that completes `accumulate`
    micro-batches also clips the gradients and steps the optimizer. The step needs no `zero_grad`.
    Nothing changes before the first call.

    Args:
        model: on one GPU, plain or wrapped by `wrap`. It may be wrapped in DDP.
        loss: `loss(output, *rest)` with `output = model(first)` for a batch `(first, *rest)`, such
            as `torch.nn.functional.cross_entropy`. It returns a scalar. None (default): the model
            takes the whole batch, and its output is the scalar, or has it as `loss`.
        optimizer: steps after each `accumulate` calls. None (default): the user's code steps.
        scaler: a GradScaler. Its scale is part of the graph. Its step and update follow the graph.
        autocast: dtype of the forward and the loss; default: no autocast.
        accumulate: micro-batches of an optimizer step; default 1. Each backward starts from the
            loss divided by this number.
        clip_norm: largest L2 norm of all gradients; default: no clipping.
        optimizer_in_graph: whether clipping and the optimizer's step are captured. None (default):
            if all groups have `capturable=True` and there is no scaler. Then the learning rate
            follows `param_groups[i]["lr"]`; other hyperparameters are constants.
        warmup: ordinary steps of each shape before its capture; default 3, with DDP 11; at least 1.
        max_graphs: most shapes that are captured; default 8. Further shapes run without a graph,
            and a warning is logged once.
    Returns:
        The step.
    Raises:
        CaptureError: the step cannot be captured; the message has the reason and the remedy.
        TypeError: `model` is not an `nn.Module`, `loss` is not callable, or the optimizer is
            Accelerate's.
        ValueError: a number is out of range; `clip_norm` and a scaler come without an optimizer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture_step takes an nn.Module, got {type(model).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be callable or None, got {type(loss).__name__}")
    if hasattr(optimizer, "accelerator_state"):
        raise TypeError(
            "the optimizer is Accelerate's; use mesa_train.integrations.accelerate.capture_step"
        )
    scaler = scaler if scaler is not None and scaler.is_enabled() else None
    wanted = (DDP_WARMUP if is_ddp(model) else _WARMUP) if warmup is None else warmup
    for name, value in (("accumulate", accumulate), ("warmup", wanted), ("max_graphs", max_graphs)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be above 0, got {clip_norm!r}")
    if clip_norm is not None and scaler is not None and optimizer is None:
        raise ValueError("clip_norm with a scaler needs the optimizer, whose gradients it unscales")
    device = the_device(model)
    backend = backends.CudaGraphs(device)
    check_model(model, accumulate)
    in_graph = check_optimizer(optimizer, scaler, optimizer_in_graph)
    update = Update(optimizer, scaler, clip_norm, in_graph, wanted)
    return CapturedStep(model, loss, update, backend, autocast, accumulate, wanted, max_graphs)


class CapturedStep:
    """A training step made by `capture_step`.

    Attributes:
        completed: whether the last call completed its `accumulate` micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor] | None,
        update: Update,
        backend: Any,
        autocast: torch.dtype | None,
        accumulate: int,
        warmup: int,
        max_graphs: int,
    ) -> None:
        self.completed = False
        self._model, self._loss, self._update, self._backend = model, loss, update, backend
        self._autocast, self._accumulate = autocast, accumulate
        self._warmup, self._max_graphs = warmup, max_graphs
        self._gradients = Gradients(model)
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        # Calls by shape, until the shape is captured.
        self._runs: dict[tuple[Any, ...], int] = {}
        self._turn = 0
        self._warned = False
        if hasattr(update.optimizer, "register_load_state_dict_post_hook"):
            # Loading a state replaces the tensors that a graph holds.
            this = weakref.ref(self)

            def loaded(_: Any) -> None:
                step = this()
                if step is not None:
                    step.reset()

            update.optimizer.register_load_state_dict_post_hook(loaded)

    def __call__(self, *batch: Tensor, **named: Tensor) -> Tensor:
        """Train on one micro-batch.

        Args:
            batch: tensors on any device.
            named: tensors that the model takes by name.
        Returns:
            The loss, a scalar on the model's device, detached, not divided by `accumulate`. It is a
            new tensor in each call.
        Raises:
            CaptureError: an argument is not a dense tensor without gradient; the step was called in
                `torch.no_grad` or `torch.autocast`; weights were moved or frozen; PyTorch cannot
                capture the step.
            TypeError: the loss is not a scalar tensor.
        """
        check_batch(batch, named, self._backend.device)
        if self._gradients.bound:
            self._gradients.check()
        if self._turn == 0 and self._gradients.bound and self._accumulate > 1:
            self._gradients.attach()
            self._gradients.zero()
        graph = self._graph_for(batch, named)
        if graph is not None:
            graph.fill(batch, named)
            graph.replay()
            loss = graph.loss
        else:
            there = _Batch(batch, named, self._backend.device)
            loss = self._backend.eager(lambda: self._forward_backward(there))
        self._gradients.attach()
        if not self._gradients.bound and self._accumulate > 1:
            self._gradients.bind()
        # The graph's own tensor changes in the next replay.
        loss = loss.clone()
        self._turn = (self._turn + 1) % self._accumulate
        self.completed = self._turn == 0
        if self.completed:
            self._update.run(self._backend, self._gradients)
        return loss

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradients' L2 norm before the last clipping, a scalar; None without `clip_norm`."""
        return self._update.grad_norm

    @property
    def graphs(self) -> int:
        """The number of shapes that are captured."""
        return len(self._graphs)

    def reset(self) -> None:
        """Drop all graphs. The next calls warm up and capture again.

        Needed after weights were moved or exchanged. Micro-batches of an incomplete optimizer step
        are discarded. Loading a state into the optimizer calls it.
        """
        self._graphs.clear()
        self._runs.clear()
        self._gradients.drop()
        self._update.reset()
        self._turn = 0

    def _graph_for(self, batch: tuple[Tensor, ...], named: dict[str, Tensor]) -> _Graph | None:
        """The graph for a batch's shapes. None: they warm up, or there are too many shapes."""
        named_layouts = [(name, *_layout(named[name])) for name in sorted(named)]
        key = (self._model.training, *(_layout(t) for t in batch), *named_layouts)
        graph = self._graphs.get(key)
        if graph is not None:
            return graph
        runs = self._runs[key] = self._runs.get(key, 0) + 1
        if runs <= self._warmup:
            return None
        if len(self._graphs) == self._max_graphs:
            if not self._warned:
                self._warned = True
                _log.warning(
                    "capture_step: batches have more than max_graphs=%d shapes; further shapes run "
                    "without a graph",
                    self._max_graphs,
                )
            return None
        graph = self._graphs[key] = self._captured(batch, named)
        return graph

    def _captured(self, batch: tuple[Tensor, ...], named: dict[str, Tensor]) -> _Graph:
        """Capture forward, loss and backward for the shapes of a batch."""
        static = _Batch(batch, named, self._backend.device, static=True)
        before = self._gradients.present()
        try:
            replay, loss = captured(
                self._backend, lambda: self._forward_backward(static), "forward and backward"
            )
        except BaseException:
            self._gradients.restore(before)
            raise
        if not self._gradients.bound:
            self._gradients.bind()
        return _Graph(static, replay, loss)

    def _forward_backward(self, batch: _Batch) -> Tensor:
        """Forward, loss and backward of a batch. Returns the detached loss.

        A replay repeats the kernels and none of the Python below.
        """
        if self._gradients.bound:
            self._gradients.attach()
            if self._accumulate == 1:
                self._gradients.zero()
        else:
            self._gradients.remove()
        with torch.autocast(
            self._backend.device.type,
            self._autocast,
            enabled=self._autocast is not None,
            # A cached cast of a weight would be stale in the next replay.
            cache_enabled=False,
        ):
            loss = self._loss_of(batch.tensors, batch.named)
        scaled = loss if self._accumulate == 1 else loss / self._accumulate
        scaler = self._update.scaler
        if scaler is not None:
            scaled = scaler.scale(scaled)
        scaled.backward()
        return loss.detach()

    def _loss_of(self, batch: list[Tensor], named: dict[str, Tensor]) -> Tensor:
        """The scalar loss of a batch, with its autograd graph."""
        loss: Any
        if self._loss is not None:
            loss = self._loss(self._model(*batch[:1], **named), *batch[1:])
        else:
            loss = self._model(*batch, **named)
            if not isinstance(loss, Tensor):
                loss = loss["loss"] if isinstance(loss, dict) else getattr(loss, "loss", loss)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = (
                f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            )
            raise TypeError(f"capture_step: the loss must be a scalar tensor, got {found}")
        return loss


class _Batch:
    """A batch on the device.

    Args:
        batch, named: tensors on any device.
        device: of the model.
        static: whether the tensors are copies, as a graph needs them.
    """

    def __init__(
        self,
        batch: tuple[Tensor, ...],
        named: dict[str, Tensor],
        device: torch.device,
        static: bool = False,
    ) -> None:
        def there(tensor: Tensor) -> Tensor:
            if static:
                return torch.empty_like(tensor, device=device).copy_(tensor)
            return tensor.to(device, non_blocking=True)

        self.tensors = [there(tensor) for tensor in batch]
        self.named = {name: there(tensor) for name, tensor in named.items()}


class _Graph(NamedTuple):
    """The graph for one combination of shapes.

    Attributes:
        batch: the static batch that the graph reads.
        replay: runs the graph.
        loss: the graph's loss, a scalar.
    """

    batch: _Batch
    replay: Callable[[], None]
    loss: Tensor

    def fill(self, batch: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        """Copy a batch to the static tensors."""
        for static, tensor in zip(self.batch.tensors, batch, strict=True):
            static.copy_(tensor, non_blocking=True)
        for name, static in self.batch.named.items():
            static.copy_(named[name], non_blocking=True)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Shape, dtype, and whether the channels come last in memory."""
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.shape, tensor.dtype, last and not tensor.is_contiguous()
