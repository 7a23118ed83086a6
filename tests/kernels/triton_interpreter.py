"""The Triton kernels under CPU tensors: on the GPU where there is one, else by Triton's interpreter.

Triton decides when a kernel is defined whether it will be interpreted, so TRITON_INTERPRET is set
around the import of ours. Its own library may have been imported before, by torch: that is wrapped
anew. Nothing of this runs where there is a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

MODULES = {
    "encode": ("affine_encode", "normalized_encode"),
    "decode": (
        "affine_decode",
        "activation_decode",
        "activation_backward",
        "activation_pair",
    ),
    "norm": ("norm_backward",),
    "softmax": ("softmax_backward",),
    "scale": ("scale_backward",),
    "bitmask": ("bitmask_encode", "bitmask_positive", "bitmask_apply"),
}
APART = {
    "forward": ("norm_encode", "activation_encode"),
    "softmax": ("softmax_encode",),
    "pair": ("activation_pair_sum",),
}
Modules = dict[str, tuple[str, ...]]


def bodies(modules: Modules = MODULES) -> SimpleNamespace:
    """The kernels by operator, for CPU tensors."""
    return on_gpu(modules) if torch.cuda.is_available() else interpreted(modules)


def apart() -> SimpleNamespace:
    """Those of `kernels.triton.schemas`: fused forwards, and the pair with its sum."""
    return bodies(APART)


def on_gpu(modules: Modules) -> SimpleNamespace:
    """The registered operators, their tensors moved to the GPU with storage and strides as they are."""
    from mesa_train import kernels

    kernels.load()

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage().cuda()
        empty = torch.empty(0, dtype=value.dtype, device="cuda")
        return empty.set_(storage, value.storage_offset(), value.size(), value.stride())

    def launcher(name: str) -> Any:
        operator = getattr(torch.ops.mesa_train, name).default

        def call(*args: Any) -> Any:
            out = operator(*map(move, args))
            return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()

        return call

    names = [name for names in modules.values() for name in names]
    return SimpleNamespace(**{name: launcher(name) for name in names})


def interpreted(modules: Modules) -> SimpleNamespace:
    """The kernels' launchers, for CPU tensors."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        _interpret_library()
        found = {}
        for module, names in modules.items():
            loaded = importlib.import_module(f"mesa_train.kernels.triton.{module}")
            found.update({name: getattr(loaded, name) for name in names})
        return SimpleNamespace(**found)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _interpret_library() -> None:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    if interpreter._convert_float is _converted:
        return
    # Triton imports this on a first launch, and it expects the library as it was.
    with contextlib.suppress(ImportError):
        importlib.import_module("triton.experimental.gluon")
    _converted.original = interpreter._convert_float  # type: ignore[attr-defined]
    interpreter._convert_float = _converted
    for name, function in list(vars(tl.standard).items()):
        if isinstance(function, JITFunction):
            wrapped = interpreter.InterpretedFunction(function.fn)
            setattr(tl.standard, name, wrapped)
            if getattr(tl, name, None) is function:
                setattr(tl, name, wrapped)


def _converted(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """Triton's conversion between floats. Between float32 and bfloat16 the interpreter's own cuts
    digits off where hardware rounds to nearest even, and it loses subnormal numbers."""
    import triton.language as tl

    if (source, target) == (tl.bfloat16, tl.float32):
        return values.view(np.uint16).astype(np.uint32) << np.uint32(16)
    if (source, target) == (tl.float32, tl.bfloat16):
        bits = values.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        even = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        return np.where(np.isnan(values), 0x7FC0, even).astype(np.uint16)
    return _converted.original(values, source, target, rounding)  # type: ignore[attr-defined]
