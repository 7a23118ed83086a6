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
            row["note"] = "only a real run can count its bytes: leave --fake out"
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
    counted = footprint(model, inputs, policy=spec.variant, autocast=autocast, loss=default_loss)
    step = timeline(model, inputs, policy=spec.variant, autocast=autocast)
    weights = counted.parameter_bytes + counted.buffer_bytes
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = sum(
        adamw_bytes(parameter.numel(), parameter.element_size(), spec.eight_bit)
        for parameter in trained
    )
    tensors = [tensor for tensor in pytree.tree_leaves(inputs) if isinstance(tensor, Tensor)]
    static_bytes = weights + optimizer + sum(tensor.nbytes for tensor in tensors)
    row: Row = {
        "saved_bytes": counted.saved_bytes,
        "offloaded_bytes": counted.offloaded_bytes or None,
        "by_operator": counted.by_operator,
        "by_module": forward_order(counted),
        "weight_bytes": weights,
        "gradient_bytes": step.gradient_bytes,
        "optimizer_bytes": optimizer,
        "step_bytes": step.peak_bytes,
        "peak_bytes": static_bytes + step.peak_bytes,
    }

    current_batch = loaded.batch or 1

    def images(batch: int) -> Any:
        resized_inputs = resized(inputs, current_batch, batch, with_data=False, make=loaded.make)
        return None if resized_inputs is None else spec.narrowed(resized_inputs)

    if memory_bytes is not None and images(1) is None:
        row["note"] = NO_BATCH
    elif memory_bytes is not None:
        budget_bytes = memory_bytes - static_bytes

        def peak(batch: int) -> int:
            return timeline(model, images(batch), policy=spec.variant, autocast=autocast).peak_bytes

        per_image = counted.saved_bytes / current_batch
        guess = max(1, int(budget_bytes / max(per_image, 1)))
        row["largest_batch"] = largest_batch_on_a_line(
            peak, budget_bytes, guess, per_image, step.gradient_bytes
        )
    return row
