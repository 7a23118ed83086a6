"""Explain an out-of-memory error: what the model saves, where, and which preset would have fitted.

The step is counted again on fake tensors, after the error, from the shapes of the last batch. So the
explanation costs a few seconds once, and nothing before.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mesa_train.engine.wrap import policy_of
from mesa_train.policy import PRESETS, Policy
from mesa_train.utils.formatting import format_bytes, format_shapes

from .footprint import footprint
from .step import device_of, tensors_in
from .timeline import timeline

_log = logging.getLogger(__name__)
# The presets that are tried, from the smallest gradient error to the largest.
CANDIDATES = ("mesa8", "mesa8-recompute", "mesa6-recompute", "mesa4-recompute")
_CPU_ERRORS = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True if PyTorch raised an error because a device, or the CPU, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_ERRORS)


class _Batch(NamedTuple):
    """The last batch of a model.

    Args:
        args, kwargs: the arguments of its forward, all tensors on the meta device.
        autocast: the dtype of autocast; None for no autocast.
        allocated_bytes: bytes on the device before the forward.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None
    allocated_bytes: int


class OutOfMemoryNotes:
    """Watches models, and adds a note to out-of-memory errors.

    Args:
        capacity: bytes that the process can use on the device, as a function; default: what the
            CUDA driver says, or on a CPU the machine's free memory and the memory of the process.
    """

    def __init__(self, capacity: Callable[[], int] | None = None) -> None:
        self._capacity = capacity
        self._batches: dict[nn.Module, _Batch] = {}
        self._handles: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Remember the shapes of each batch of a model."""
        hook = model.register_forward_pre_hook(self._remember, with_kwargs=True)
        self._handles.append(hook)

    def stop(self) -> None:
        """Remember no more batches."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def explain(self, error: BaseException) -> None:
        """Add a note for each model to an out-of-memory error; other errors stay as they are."""
        if not is_out_of_memory(error):
            return
        for model, batch in list(self._batches.items()):
            try:
                note = "\n".join(self._lines(model, batch))
            except Exception as reason:  # a user's model may raise any error on fake tensors
                note = f"mesa_train: the step of {type(model).__name__} was not counted: {reason}"
            if hasattr(error, "add_note"):
                error.add_note(note)
            else:  # Python 3.10
                _log.error("%s", note)

    def _remember(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """The hook before a forward."""
        if not torch.is_grad_enabled():
            return
        device = device_of(model)
        dtype = None
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        of_args, of_kwargs = pytree.tree_map_only(
            Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs)
        )
        self._batches[model] = _Batch(of_args, of_kwargs, dtype, _allocated(device))

    def _lines(self, model: nn.Module, batch: _Batch) -> Iterator[str]:
        """The lines of the note."""
        device = device_of(model)
        policy = policy_of(model)
        name = _name_of(policy)
        inputs: Any = (batch.args, batch.kwargs)
        caller = _Called(model)
        counted = footprint(caller, inputs, policy=None, autocast=batch.autocast, fake=True)
        shapes = format_shapes([list(t.shape) for t in tensors_in((batch.args, batch.kwargs))])
        yield (
            f"mesa_train: with {name}, {type(model).__name__} saves {format_bytes(counted.saved_bytes)} "
            f"for the backward of {shapes}"
        )
        yield f"  by operator: {_largest(counted.by_operator)}"
        yield f"  by module: {_largest(_by_block(counted.by_module))}"
        capacity = self._capacity() if self._capacity is not None else _capacity_of(device)
        need = _need(caller, inputs, None, batch)
        yield f"  a step needs about {format_bytes(need)}; the process can use {format_bytes(capacity)}"
        needs = {}
        for candidate in CANDIDATES:
            if candidate == name:
                continue
            needs[candidate] = _need(caller, inputs, PRESETS[candidate], batch)
            if needs[candidate] <= capacity:
                yield f"  {candidate} would have fitted: about {format_bytes(needs[candidate])}"
                return
        smallest = min(needs, key=lambda preset: needs[preset])
        yield (
            f"  no preset fits this batch; {smallest} needs the least, about "
            f"{format_bytes(needs[smallest])}: take a smaller batch, or offload"
        )


@contextlib.contextmanager
def out_of_memory_notes(*models: nn.Module) -> Iterator[OutOfMemoryNotes]:
    """Within the context, out-of-memory errors get a note.

    The note says what each model saves for the backward and where, how much memory the step needs,
    and the first preset that would have fitted. Python prints it below the traceback. (Python 3.10
    has no notes; there it is logged as an error.)

    Args:
        models: the models that are trained, wrapped or not.

    Raises:
        TypeError: a model is not an `nn.Module`.
    """
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"out_of_memory_notes takes nn.Modules, got {type(model).__name__}")
    notes = OutOfMemoryNotes()
    for model in models:
        notes.watch(model)
    try:
        yield notes
    except Exception as error:
        notes.stop()
        notes.explain(error)
        raise
    finally:
        notes.stop()


class _Called(nn.Module):
    """Calls a model with positional and keyword arguments, which `footprint` takes one kind of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: Any, kwargs: Any) -> Any:
        """The model's output."""
        return self.model(*args, **kwargs)


def _need(model: nn.Module, inputs: Any, policy: Policy | None, batch: _Batch) -> int:
    """Bytes of a step: before its forward, and the highest sum of what it allocates."""
    counted = timeline(model, inputs, policy=policy, autocast=batch.autocast)
    return batch.allocated_bytes + counted.peak_bytes


def _allocated(device: torch.device) -> int:
    """Bytes that PyTorch has allocated on a GPU, or the resident bytes of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    from .peak import resident

    return resident() or 0


def _capacity_of(device: torch.device) -> int:
    """Bytes that the process can use on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    from .peak import available

    return available() + _allocated(device)


def _name_of(policy: Policy | None) -> str:
    """The preset's name of a policy."""
    if policy is None:
        return "plain PyTorch"
    return next((name for name, preset in PRESETS.items() if preset == policy), "this policy")


def _largest(sizes: dict[str, int], most: int = 4) -> str:
    """The largest entries in words."""
    entries = sorted(sizes.items(), key=lambda item: -item[1])
    texts = [f"{name or '(model)'} {format_bytes(size)}" for name, size in entries[:most]]
    rest: Sequence[tuple[str, int]] = entries[most:]
    if rest:
        texts.append(f"{len(rest)} more {format_bytes(sum(size for _, size in rest))}")
    return ", ".join(texts)


def _by_block(by_module: dict[str, int]) -> dict[str, int]:
    """Bytes summed by the part of a model's name up to its first number, such as `blocks.*`."""
    totals: dict[str, int] = {}
    for name, size in by_module.items():
        parts = name.removeprefix("model").removeprefix(".").split(".")
        numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        block = parts[0] if numbered is None else ".".join([*parts[:numbered], "*"])
        totals[block] = totals.get(block, 0) + size
    return totals
