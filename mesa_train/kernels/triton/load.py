"""The registration of the Triton kernels for GPUs, without an import of Triton.

For each operator a small function is registered. Its first call with a tensor on a GPU imports the
kernels. Triton compiles a kernel for each new combination of shapes (about a second each), and
stores it in its cache on disk.

Environment:
    MESA_TRAIN_TRITON=0  use the plain-torch reference
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from mesa_train.kernels import reference, schemas

from . import schemas as triton_schemas

# operator: the file of its launcher. The launcher has the operator's name.
OPERATORS = {
    "affine_encode": "encode",
    "normalized_encode": "encode",
    "affine_decode": "decode",
    "activation_decode": "decode",
    "activation_backward": "decode",
    "activation_pair": "decode",
    "activation_pair_sum": "pair",
    "norm_backward": "norm",
    "softmax_backward": "softmax",
    "scale_backward": "scale",
    "bitmask_encode": "bitmask",
    "bitmask_positive": "bitmask",
    "bitmask_apply": "bitmask",
    "norm_encode": "forward",
    "activation_encode": "forward",
    "softmax_encode": "softmax",
}
# NVIDIA's and AMD's GPUs share the first key.
_KEYS = ("CUDA", "XPU")
# The oldest compute capability that Triton supports officially. Triton 3.8 compiles all kernels
# for 7.0 and 7.5 too.
_SUPPORTED = (8, 0)

logger = logging.getLogger(__name__)


@lru_cache
def load() -> None:
    """Register the Triton kernels for GPUs, once per process."""
    if os.environ.get("MESA_TRAIN_TRITON", "1") == "0":
        return
    for name in OPERATORS:
        for key in _KEYS:
            schemas._library.impl(name, _door(name), key)


def _door(name: str) -> Callable[..., Any]:
    """The function that is registered for an operator."""
    bodies: dict[torch.device, Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        here = args[0].device
        body = bodies.get(here)
        if body is None:
            body = bodies.setdefault(here, _body(name, here))
        # A kernel runs on the current device, which may differ from the tensors' device.
        if here.index == torch.accelerator.current_device_index():
            return body(*args)
        with torch.accelerator.device_index(here.index):
            return body(*args)

    return call


def _body(name: str, device: torch.device) -> Callable[..., Any]:
    """The launcher of an operator, or its checked reference if Triton cannot run."""
    reason = _obstacle(device)
    if reason is None:
        module = importlib.import_module(f"mesa_train.kernels.triton.{OPERATORS[name]}")
        launcher: Callable[..., Any] = getattr(module, name)
        return launcher
    apart = hasattr(triton_schemas, f"_{name}")
    fake = getattr(triton_schemas if apart else schemas, f"_{name}")
    plain = getattr(triton_schemas if apart else reference, name)

    def checked(*args: Any) -> Any:
        fake(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        return plain(*args)

    return checked


@lru_cache
def _obstacle(device: torch.device) -> str | None:
    """The reason why Triton cannot run on a device, logged once; None if it can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        reason, remedy = str(error), "To fix it, install triton (pip install triton); to"
    else:
        refused = _refused(device)
        if refused is None:
            return None
        reason, remedy = refused, "To"
    logger.warning(
        "mesa_train runs without its Triton kernels on %s: the plain-torch reference gives the "
        "same results about ten times slower. %s silence this, set MESA_TRAIN_TRITON=0. "
        "The reason: %s",
        device,
        remedy,
        reason,
    )
    return reason


def _refused(device: torch.device) -> str | None:
    """The reason why Triton cannot compile for a device; None if it can.

    It is tried with one kernel if the device is older than the GPUs that Triton supports. The trial
    takes about a second.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _SUPPORTED:
        return None
    encode = importlib.import_module("mesa_train.kernels.triton.encode")
    try:
        with torch.accelerator.device_index(device.index):
            encode.compile_one()
    # Triton, LLVM and the assembler raise exceptions of many types.
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        name = f"compute capability {capability[0]}.{capability[1]}"
        return f"{device} has {name}, and Triton does not compile for it: {line}"
    return None
