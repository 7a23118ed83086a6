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
            these points. If there is one point, they are on the line through (0, 0) and the point.
        saved_per_image: bytes saved for the backward, for each image.
        split: share of the bytes that tensor parallelism splits, from 0 to 1.
        offloaded_per_image: bytes in CPU memory, for each image.
    """

    points: tuple[tuple[int, int], ...]
    saved_per_image: int
    split: float
    offloaded_per_image: int = 0

    def bytes(self, batch: int, tensor_parallel: int = 1) -> int:
        """Bytes of `batch` images on one GPU, if `tensor_parallel` GPUs share a layer."""
        (low_batch, low_bytes), (high_batch, high_bytes) = self._segment(
            lambda point: point[0] >= batch
        )
        unsplit = low_bytes + (high_bytes - low_bytes) * (batch - low_batch) / (
            high_batch - low_batch
        )
        return int(unsplit * self._factor(tensor_parallel)) if batch else 0

    def largest(self, budget_bytes: int, tensor_parallel: int = 1) -> int:
        """The largest batch whose bytes are at most `budget_bytes`; 0 if none fits."""
        budget_bytes = int(budget_bytes / self._factor(tensor_parallel))
        (low_batch, low_bytes), (high_batch, high_bytes) = self._segment(
            lambda point: point[1] > budget_bytes
        )
        span = high_batch - low_batch
        added = (budget_bytes - low_bytes) * span / max(1, high_bytes - low_bytes)
        return max(0, int(low_batch + added))

    def _factor(self, tensor_parallel: int) -> float:
        """Share of the bytes on one of the GPUs that share a layer."""
        return 1 - self.split + self.split / tensor_parallel

    def _segment(self, is_beyond: Callable[[tuple[int, int]], bool]) -> Sequence[tuple[int, int]]:
        """The two points that end with the first point for which `is_beyond` is true."""
        points = self.points if len(self.points) > 1 else ((0, 0), *self.points)
        end = next(
            (index for index, point in enumerate(points) if is_beyond(point)), len(points) - 1
        )
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
        counted = footprint(model, images, policy=policy, autocast=dtype, loss=default_loss)
    on_tokens = sum(size for name, size in counted.by_operator.items() if name in _ON_TOKENS)
    return Activations(
        points=tuple(points.items()),
        saved_per_image=counted.saved_bytes // batch,
        split=1 - on_tokens / max(1, counted.saved_bytes),
        offloaded_per_image=counted.offloaded_bytes // batch,
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


def _images(loaded: Loaded, batch: int, size: int, to_bfloat16: bool) -> Any:
    """The inputs of another batch size on the meta device."""
    images = resized(loaded.inputs, loaded.batch or batch, size, with_data=False, make=loaded.make)
    if images is None:
        raise ValueError(f"{loaded.name}: {NO_BATCH}")
    return _in_bfloat16(images) if to_bfloat16 else images


def _in_bfloat16(inputs: Any) -> Any:
    """The inputs in bfloat16."""
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(
        torch.Tensor,
        lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t,
        inputs,
    )
