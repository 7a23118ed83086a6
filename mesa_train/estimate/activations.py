"""Count the activations of a training step on fake tensors, as a line through batch sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mesa_train.loading.inputs import NO_BATCH, resized
from mesa_train.loading.model import Loaded
from mesa_train.measure.fake_tensors import gpu_norms
from mesa_train.measure.footprint import footprint
from mesa_train.measure.step import default_loss
from mesa_train.measure.timeline import timeline
from mesa_train.policy import Policy

from .lora import with_lora

# Operators on whole tokens, which tensor parallelism does not split.
_ON_TOKENS = frozenset(("layer_norm", "rms_norm", "group_norm", "batch_norm", "checkpoint"))


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes of a step beside the model states.

    Args:
        points: (batch, bytes) at rising batch sizes. Other batches are on the line through two of
            them; if there is one point, on the line from zero.
        saved_per_image: bytes saved for the backward, an image.
        split: share of the bytes that tensor parallelism splits.
        offloaded_per_image: bytes in CPU memory, an image.
    """

    points: tuple[tuple[int, int], ...]
    saved_per_image: int
    split: float
    offloaded_per_image: int = 0

    def bytes(self, batch: int, tensor_parallel: int = 1) -> int:
        """Bytes of `batch` images on one GPU, if `tensor_parallel` GPUs share a layer."""
        (low, base), (high, top) = self._segment(lambda point: point[0] >= batch)
        whole = base + (top - base) * (batch - low) / (high - low)
        return int(whole * self._factor(tensor_parallel)) if batch else 0

    def largest(self, room: int, tensor_parallel: int = 1) -> int:
        """The largest batch that fits `room` bytes; 0 if none fits."""
        room = int(room / self._factor(tensor_parallel))
        (low, base), (high, top) = self._segment(lambda point: point[1] > room)
        return max(0, int(low + (room - base) * (high - low) / max(1, top - base)))

    def _factor(self, tensor_parallel: int) -> float:
        """Share of the bytes on one of the GPUs that share a layer."""
        return 1 - self.split + self.split / tensor_parallel

    def _segment(self, beyond: Callable[[tuple[int, int]], bool]) -> Sequence[tuple[int, int]]:
        """The two points whose line holds up to the first point that is `beyond`."""
        points = self.points if len(self.points) > 1 else ((0, 0), *self.points)
        end = next((i for i, point in enumerate(points) if beyond(point)), len(points) - 1)
        return points[max(0, end - 1) :][:2]


def activations_of(
    loaded: Loaded,
    batch: int,
    policy: str | Policy,
    autocast: bool,
    lora: int = 0,
    sizes: Sequence[int] = (),
) -> Activations:
    """Count the bytes of a step beside weights, gradients and optimizer states.

    The gradients of the module that runs its backward are part of these bytes.

    Args:
        loaded: a model and its inputs.
        batch: number of images of the inputs.
        policy: name of a method, or a Policy.
        autocast: float32 weights under bfloat16 autocast; False for a model in bfloat16.
        lora: rank of LoRA; 0 for none.
        sizes: batches to count at; default: one image, `batch` and twice as many.
    """
    model = loaded.model
    if lora:
        with_lora(model, lora)
    dtype = torch.bfloat16 if autocast else None
    if not autocast:
        model = model.to(torch.bfloat16)
    points = {}
    with gpu_norms():
        for size in sizes or sorted({1, batch, 2 * batch}):
            images = _images(loaded, batch, size, not autocast)
            points[size] = timeline(model, images, policy=policy, autocast=dtype).working_bytes
        images = _images(loaded, batch, batch, not autocast)
        found = footprint(model, images, policy=policy, autocast=dtype, loss=default_loss)
    on_tokens = sum(size for name, size in found.by_operator.items() if name in _ON_TOKENS)
    return Activations(
        points=tuple(points.items()),
        saved_per_image=found.saved_bytes // batch,
        split=1 - on_tokens / max(1, found.saved_bytes),
        offloaded_per_image=found.offloaded_bytes // batch,
    )


def forward_activations(loaded: Loaded, batch: int, sizes: Sequence[int]) -> Activations:
    """Count the bytes of a bfloat16 forward without a backward."""
    model = loaded.model.eval().to(torch.bfloat16)
    points = []
    with gpu_norms():
        for size in sizes:
            step = timeline(model, _images(loaded, batch, size, True), backward=False)
            points.append((size, step.peak_bytes))
    return Activations(tuple(points), 0, 1.0)


def _images(loaded: Loaded, own: int, size: int, narrow: bool) -> Any:
    """The inputs of another batch size on the meta device."""
    images = resized(loaded.inputs, loaded.batch or own, size, data=False, make=loaded.make)
    if images is None:
        raise ValueError(f"{loaded.name}: {NO_BATCH}")
    return _narrow(images) if narrow else images


def _narrow(inputs: Any) -> Any:
    """The inputs in bfloat16."""
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(
        torch.Tensor,
        lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t,
        inputs,
    )
