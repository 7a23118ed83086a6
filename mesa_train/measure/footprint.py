"""Count the bytes that a model saves between its forward and its backward, to the byte and by name.

One forward runs, on the real tensors or on fake tensors (no data, no memory, the same kernels). At
its end, each storage that autograd holds is counted once, at its full size. Parameters and buffers
are counted apart, because they exist with or without a backward. Low-precision copies of weights
that autocast makes do count: they stay until the backward, as "weight cast".
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.engine.wrap import report_of
from mesa_train.methods.apply import applied
from mesa_train.policy import Policy
from mesa_train.stash.offload import CountedOffloadStream, through
from mesa_train.utils.formatting import format_bytes, format_table

from .coverage import Coverage, coverage
from .fake_tensors import FakeModel
from .isolation import isolated
from .saved_tensors import Recorder, SavedStorage, by_address
from .step import arguments, autocasting, device_of, tensors_in


@dataclasses.dataclass(frozen=True)
class Footprint:
    """The bytes that one forward saves for its backward. Every storage is counted once.

    Args:
        saved_bytes: bytes saved for the backward on the model's device, beyond parameters and
            buffers.
        parameter_bytes: bytes of the model's parameters, which exist with or without a backward.
        buffer_bytes: bytes of the model's buffers.
        rows: one `SavedStorage(operator, module, dtype, shape, saved_bytes, offloaded)` for each storage,
            in forward order.
        notes: remarks on how the bytes were counted.
        stored: under a policy, how each saved tensor is stored and why (see `coverage`); None
            without one.
        offloaded_bytes: bytes saved in CPU memory, under a policy that offloads. They are not part
            of the sums by operator, dtype and module.
    """

    saved_bytes: int
    parameter_bytes: int
    buffer_bytes: int
    rows: tuple[SavedStorage, ...]
    notes: tuple[str, ...] = ()
    stored: Coverage | None = None
    offloaded_bytes: int = 0

    @property
    def by_operator(self) -> dict[str, int]:
        """Bytes by torch function, largest first."""
        return _sums((row.operator, row.saved_bytes) for row in self._on_device)

    @property
    def by_dtype(self) -> dict[str, int]:
        """Bytes by dtype as saved (codes are uint8), largest first."""
        return _sums((row.dtype, row.saved_bytes) for row in self._on_device)

    @property
    def by_module(self) -> dict[str, int]:
        """Bytes by qualified module name without submodules, largest first; "" is the model."""
        return _sums((row.module, row.saved_bytes) for row in self._on_device)

    @property
    def _on_device(self) -> list[SavedStorage]:
        """The rows on the model's device."""
        return [row for row in self.rows if not row.offloaded]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain Python values."""
        return {
            "saved_bytes": self.saved_bytes,
            "offloaded_bytes": self.offloaded_bytes,
            "parameter_bytes": self.parameter_bytes,
            "buffer_bytes": self.buffer_bytes,
            "by_operator": self.by_operator,
            "by_dtype": self.by_dtype,
            "by_module": self.by_module,
            "rows": [{**row._asdict(), "shape": list(row.shape)} for row in self.rows],
            "notes": list(self.notes),
            "stored": None if self.stored is None else self.stored.to_dict()["rows"],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def table(self, by: str = "operator") -> str:
        """Format the bytes as an aligned plain-text table.

        Args:
            by: "operator", "dtype" or "module".

        Raises:
            ValueError: `by` is another name.
        """
        groups = {"operator": self.by_operator, "dtype": self.by_dtype, "module": self.by_module}
        if by not in groups:
            raise ValueError(f"table(by={by!r}): choose from {', '.join(groups)}")
        counts = _sums((getattr(row, by), 1) for row in self._on_device)
        total = self.saved_bytes or 1
        lines = [
            [name or "(model)", str(counts[name]), format_bytes(size), f"{size / total:.1%}"]
            for name, size in groups[by].items()
        ]
        count = str(len(self._on_device))
        lines.append(["saved for backward", count, format_bytes(self.saved_bytes), ""])
        if self.offloaded_bytes:
            offloaded_count = str(len(self.rows) - len(self._on_device))
            lines.append(["in CPU memory", offloaded_count, format_bytes(self.offloaded_bytes), ""])
        lines.append(["parameters", "", format_bytes(self.parameter_bytes), ""])
        lines.append(["buffers", "", format_bytes(self.buffer_bytes), ""])
        rule = len(groups[by])
        table = format_table([by, "tensors", "size", "share"], lines, rule_before=rule)
        return "\n".join([table, *(f"note: {note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.table()


def footprint(
    model: nn.Module,
    inputs: Any,
    *,
    policy: Policy | str | None = None,
    autocast: torch.dtype | None = None,
    device: str | torch.device | None = None,
    fake: bool = False,
    loss: Callable[[Any], Any] | None = None,
) -> Footprint:
    """Count the bytes that `model(inputs)` saves for its backward.

    The model and the random state do not change.

    Args:
        model: the module to count.
        inputs: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        policy: None counts the model as it is, wrapped or not. "plain" counts it without
            mesa_train. A Policy or the name of a preset counts it with that policy. "checkpoint"
            counts it with every block checkpointed.
        autocast: torch.bfloat16 or torch.float16 runs the forward under `torch.autocast` with that
            dtype; None runs it without.
        device: the device that the fake tensors stand for, "cpu" or "cuda"; default: the model's
            device, "cpu" for a model on meta. Offloaded tensors are counted as on a GPU if the fake
            tensors stand for a GPU or the model is on meta.
        fake: count on fake tensors: no memory, no arithmetic, the same bytes. A model on the meta
            device is always counted on fake tensors.
        loss: called with the output inside the measurement, so that the tensors that a loss saves
            count too.

    Returns:
        A `Footprint`.

    Raises:
        ValueError: no output requires grad, the forward needs values that fake tensors do not have,
            or an argument is out of range.
        TypeError: `model` is not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"footprint() counts an nn.Module, got {type(model).__name__}")
    args, kwargs = arguments(inputs)
    model_device = device_of(model)
    target, fake_model, notes = _target(model, device, fake, autocast)
    if fake_model is not None:
        args, kwargs = fake_model.of(args), fake_model.of(kwargs)
    recorder = Recorder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(applied(model, policy))
        parameter_bytes = _storage_bytes(model.parameters())
        buffer_bytes = _storage_bytes(model.buffers())
        stack.enter_context(isolated(model, fake_model))
        if fake_model is not None:
            stack.enter_context(through(counted(model_device, target)))
        with recorder.recording(model), autocasting(target, autocast):
            output = model(*args, **kwargs)
            if loss is not None:
                output = loss(output)
        recorder.name_functions(tensors_in(output))
        rows = tuple(recorder.storages())
        report = report_of(model)
        stored = coverage(model) if report is not None and report.rows else None
    if not rows and not any(tensor.requires_grad for tensor in tensors_in(output)):
        raise ValueError(
            f"no tensor is saved for a backward: no output of {type(model).__name__} requires grad "
            "(are all parameters frozen, or is the forward decorated with no_grad?)"
        )
    if fake_model is not None and any(row.operator in ("lstm", "gru") for row in rows):
        notes.append("fake tensors do not show the workspace that a recurrent layer's kernel saves")
    saved_bytes = sum(row.saved_bytes for row in rows if not row.offloaded)
    offloaded_bytes = sum(row.saved_bytes for row in rows if row.offloaded)
    if offloaded_bytes and target.type == "cpu":
        notes.append("offloaded tensors are counted as on a GPU: in CPU memory")
    return Footprint(
        saved_bytes, parameter_bytes, buffer_bytes, rows, tuple(notes), stored, offloaded_bytes
    )


def counted(model_device: torch.device, fake_device: torch.device) -> CountedOffloadStream | None:
    """Choose how to count offloaded tensors on fake tensors.

    Args:
        model_device: device of the model.
        fake_device: device that the fake tensors stand for.

    Returns:
        A stream that counts offloaded tensors as on a GPU; None for a model on a CPU, unless
            `fake_device` is a GPU.
    """
    return (
        CountedOffloadStream(fake_device)
        if model_device.type in ("meta", "cuda") or fake_device.type == "cuda"
        else None
    )


def target_of(
    model: nn.Module,
    device: str | torch.device | None,
    fake: bool,
    autocast: torch.dtype | None,
) -> tuple[torch.device, FakeModel | None]:
    """(device that a forward sees, the fake model if it runs on fake tensors).

    Args:
        model, device, fake, autocast: as for `footprint`.

    Raises:
        ValueError: an argument is out of range.
    """
    target, fake_model, _ = _target(model, device, fake, autocast)
    return target, fake_model


def _target(
    model: nn.Module,
    device: str | torch.device | None,
    fake: bool,
    autocast: torch.dtype | None,
) -> tuple[torch.device, FakeModel | None, list[str]]:
    """(device that the forward sees, the fake model if it runs on fake tensors, notes)."""
    model_device = device_of(model)
    on_meta = model_device.type == "meta"
    target = (
        torch.device(device)
        if device is not None
        else torch.device("cpu")
        if on_meta
        else model_device
    )
    if target.type == "meta":
        raise ValueError("device must be the device that the fake tensors stand for, got 'meta'")
    if not (fake or on_meta):
        if device is not None and target.type != model_device.type:
            raise ValueError(
                f"the model is on {model_device}, not on {target}: move the model, or count with "
                "fake=True"
            )
        return model_device, None, []
    notes = [f"counted on fake {target.type} tensors"]
    if target.type == "cuda" and not torch.cuda.is_available():
        if autocast is not None:
            raise ValueError(
                "PyTorch sees no CUDA device here and then ignores CUDA autocast, so the bytes of a "
                "GPU cannot be counted; device='cpu' is close to them"
            )
        notes.append(
            "no CUDA device here: PyTorch then uses attention's math kernel, which saves the "
            "attention matrix; device='cpu' is closer to a GPU"
        )
    return target, FakeModel(target), notes


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages of the tensors, each counted once."""
    return sum(storage.nbytes() for storage in by_address(tensors).values())


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Sum the sizes by name, largest first."""
    totals: dict[str, int] = {}
    for name, size in pairs:
        totals[name] = totals.get(name, 0) + size
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
