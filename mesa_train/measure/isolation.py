"""Run a model without side effects on its buffers and random state.

Inside `isolated` every buffer is a copy, so BatchNorm writes its running statistics to the copy.
With `fakes`, every parameter, buffer and tensor attribute is a fake tensor, and a model of any size
runs in seconds and without memory. At the end every module gets its old attributes back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mesa_train.utils.errors import place

from .fake_tensors import FAKES_CANNOT, NUMPY, FakeModel

# nn.Module's own tables: parameters and buffers are replaced one by one, and each submodule is
# visited.
_TABLES = {"_parameters", "_buffers", "_modules"}


@contextlib.contextmanager
def isolated(model: nn.Module, fakes: FakeModel | None = None) -> Iterator[None]:
    """Within the context, `model` has copies of its buffers, or fake tensors.

    Afterwards the model is unchanged. The random generators of the CPU and of the model's GPUs get
    their state back too.

    Args:
        model: the module to run.
        fakes: replace all tensors of the model by these fake tensors; None copies the buffers
            alone.

    Raises:
        ValueError: a model with fake tensors reads values, which fake tensors do not have.
    """
    saved = [
        (module, dict(vars(module)), dict(module._parameters), dict(module._buffers))
        for module in model.modules()
    ]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    copies: dict[int, Tensor] = {}
    try:
        for module, attributes, parameters, buffers in saved:
            if fakes is None:
                for name, buffer in buffers.items():
                    if buffer is not None:
                        copy = copies.setdefault(id(buffer), buffer.detach().clone())
                        module._buffers[name] = copy
                continue
            module._parameters.update(
                {name: fakes.of(tensor) for name, tensor in parameters.items()}
            )
            module._buffers.update({name: fakes.of(tensor) for name, tensor in buffers.items()})
            for name, value in attributes.items():
                if name not in _TABLES and _holds_tensor(value):
                    vars(module)[name] = fakes.of(value)
        with torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices)):
            if fakes is None:
                yield
            else:
                with _no_values(model), fakes.on():
                    yield
    finally:
        for module, attributes, parameters, buffers in saved:
            vars(module).clear()
            vars(module).update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)


@contextlib.contextmanager
def _no_values(model: nn.Module) -> Iterator[None]:
    """Raise a ValueError that says where the model reads values, which fake tensors do not have.

    The message also names the measurements that work for such a model.
    """
    try:
        yield
    except (*FAKES_CANNOT, RuntimeError) as error:
        if not isinstance(error, FAKES_CANNOT) and NUMPY not in str(error):
            raise
        line = place(error)
        raise ValueError(
            f"{type(model).__name__} reads values, which fake tensors do not have "
            f"({line + ': ' if line else ''}{error}); use `mesa-train compare` or `mesa-train profile` "
            "without --fake, or footprint with fake=False and the model on a real device"
        ) from error


def _holds_tensor(value: Any) -> bool:
    """True if an attribute is or contains a tensor."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
