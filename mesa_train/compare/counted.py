"""Compare methods on fake tensors: saved bytes, peak of the step, largest batch.

Works for any model and batch, in seconds. It gives no times and no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mesa_train.loading.inputs import NO_BATCH, resized
from mesa_train.loading.model import Loaded
from mesa_train.measure.footprint import footprint
from mesa_train.measure.module_tree import forward_order
from mesa_train.measure.optimizer_states import adamw_bytes
from mesa_train.measure.step import default_loss
from mesa_train.measure.timeline import timeline
from mesa_train.methods.checkpointing import NoBlocks
from mesa_train.methods.spec import MethodSpec

from .batch_size_finder import largest_batch_on_a_line

Row = dict[str, Any]


def count(
    make: Callable[[], Loaded],
    methods: Sequence[str],
    *,
    dtype: torch.dtype | None,
    memory_bytes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Generator[Row, None, None]:
    """Count a comparison on fake tensors.

    Args:
        make: loads the model on the meta device.
        methods: names of the methods.
        dtype: dtype of autocast, or None.
        memory_bytes: bytes that the largest batch must fit; None finds no largest batch.
        progress: called with (method, its number from 0, number of methods).

    Yields:
        A row for each method. If a method needs a real run, its row has the reason as "note".

    Raises:
        ValueError: a method is unknown, or there is none; and the errors of `footprint`.
    """
    if not methods:
        raise ValueError("a comparison needs a method, such as plain or mesa8")
    specs = [MethodSpec.of(method) for method in methods]
    for number, spec in enumerate(specs):
        if progress is not None:
            progress(spec.name, number, len(specs))
        row: Row = {"method": spec.name, "caveats": list(spec.caveats)}
        if spec.countable:
            try:
                row |= _counted(make(), spec, dtype, memory_bytes)
            except NoBlocks as reason:
                row["note"] = str(reason)
        else:
            row["note"] = "its bytes show in a real run alone: leave --fake out"
        yield row


def _counted(
    loaded: Loaded,
    spec: MethodSpec,
    dtype: torch.dtype | None,
    memory_bytes: int | None,
) -> Row:
    """The row of one method."""
    model, inputs = spec.cast(loaded.model, loaded.inputs)
    autocast = spec.autocast(dtype)
    found = footprint(model, inputs, policy=spec.variant, autocast=autocast, loss=default_loss)
    step = timeline(model, inputs, policy=spec.variant, autocast=autocast)
    weights = found.parameter_bytes + found.buffer_bytes
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = sum(adamw_bytes(p.numel(), p.element_size(), spec.eight_bit) for p in trained)
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    standing = weights + optimizer + sum(t.nbytes for t in tensors)
    row: Row = {
        "saved_bytes": found.saved_bytes,
        "offloaded_bytes": found.offloaded_bytes or None,
        "by_operator": found.by_operator,
        "by_module": forward_order(found),
        "weight_bytes": weights,
        "gradient_bytes": step.gradient_bytes,
        "optimizer_bytes": optimizer,
        "step_bytes": step.peak_bytes,
        "peak_bytes": standing + step.peak_bytes,
    }

    own = loaded.batch or 1

    def images(batch: int) -> Any:
        other = resized(inputs, own, batch, data=False, make=loaded.make)
        return None if other is None else spec.narrowed(other)

    if memory_bytes is not None and images(1) is None:
        row["note"] = NO_BATCH
    elif memory_bytes is not None:
        room = memory_bytes - standing

        def peak(batch: int) -> int:
            return timeline(model, images(batch), policy=spec.variant, autocast=autocast).peak_bytes

        per_image = found.saved_bytes / own
        guess = max(1, int(room / max(per_image, 1)))
        row["largest_batch"] = largest_batch_on_a_line(
            peak, room, guess, per_image, step.gradient_bytes
        )
    return row
