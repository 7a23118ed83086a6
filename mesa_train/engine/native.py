"""The native rows: the common calls of the operators, and their backward, in C++.

Why: on a fast GPU a step waits for Python. A native row takes less time than a Python row and its
autograd node (docs/benchmarks.md has the times of steps).

How: `native/` is a C++ extension. It reads and makes the same objects as the Python code (stashes,
lineage, report). A call that is not a common case runs the Python row, which stays the reference.
So a step may mix both. Both save the same tensors.

The extension is compiled once per machine, like the CPU kernels (see `utils/cpp_build.py`), and
needs no CUDA. Without a compiler or Python's headers, every call runs in Python.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from mesa_train.codecs.affine import Affine
from mesa_train.codecs.lossless import Lossless
from mesa_train.ops import (
    activation,
    add,
    attention,
    linear,
    matmul,
    multiply,
    norm,
    softmax,
    table,
)
from mesa_train.ops.fallback import NOTHING
from mesa_train.stash import backward_cache, recipes, sharded_parameters, stash, tensors
from mesa_train.stash.context import Report

_nn = torch._C._nn

# Torch functions with a native row, by the row's name in `native/rows.cpp`.
ROWS: dict[Any, str] = {
    _nn.linear: "linear",
    F.layer_norm: "layer_norm",
    F.gelu: "gelu",
    F.silu: "silu",
    F.scaled_dot_product_attention: "attention",
    F.softmax: "softmax",
    torch.softmax: "softmax",
    Tensor.softmax: "softmax",
    torch.matmul: "matmul",
    Tensor.matmul: "matmul",
    Tensor.__matmul__: "matmul",
    torch.bmm: "bmm",
    Tensor.bmm: "bmm",
    torch.mm: "mm",
    Tensor.mm: "mm",
    torch.mul: "mul",
    Tensor.mul: "mul",
    Tensor.mul_: "mul_",
    torch.add: "add",
    Tensor.add: "add",
    Tensor.add_: "add",
    F.pad: "pad",
    F.dropout: "dropout",
    torch.dropout: "dropout",
}
_RESHAPES = frozenset("reshape view flatten unflatten squeeze unsqueeze contiguous clone".split())
for _name in sorted(table.VIEWS):
    for _owner in (torch, Tensor):
        if hasattr(_owner, _name):
            ROWS[getattr(_owner, _name)] = "reshape" if _name in _RESHAPES else "view"
ROWS[Tensor.__getitem__] = "view"

# Classes whose forward calls one torch function: (class, name in torch.nn.functional, the number
# of `Stock::Kind`).
_STOCK = (
    (nn.Linear, "linear", 0),
    (nn.LayerNorm, "layer_norm", 1),
    (nn.GELU, "gelu", 2),
    (nn.Dropout, "dropout", 3),
)


# The extension. None before the first `wrap` or `compress`, and if it cannot be loaded.
extension: Any = None

_lock = threading.Lock()
_prepared = False
# The extension, or None, also while `python_rows` is active.
_loaded: ModuleType | None = None


def prepare(mode: type) -> None:
    """Load kernels, foreign rows and the native rows now.

    Otherwise the first forward would, and torch.compile may trace it. Idempotent and thread-safe.

    Args:
        mode: the class of the compression mode.
    """
    global _prepared, _loaded, extension
    if _prepared:
        table.prepare()
        return
    with _lock:
        if _prepared:
            return
        from mesa_train.native import build

        # Both compile at the first use on a machine.
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(build.load)
            table.prepare()
            _loaded = future.result()
        if _loaded is not None:
            _set_up(_loaded, mode)
        extension = _loaded
        _prepared = True


@contextlib.contextmanager
def python_rows(mode: type) -> Iterator[None]:
    """Context manager: run every row in Python, as on a machine without a compiler.

    For tests and measurements. Not thread-safe.

    Args:
        mode: the class of the compression mode.
    """
    global extension
    prepare(mode)
    before, extension = extension, None
    try:
        yield
    finally:
        extension = before


def _set_up(module: Any, mode: type) -> None:
    """Give the extension the classes and tables of the Python code."""
    classes = [
        *(stash.Stash, stash.Leaf, stash.MatrixLayout, recipes.Replay, recipes.Cast),
        *(norm.Scaled, norm.Normalized, activation.Activated, multiply.Multiplied),
        *(Affine, Lossless, Report, mode, DeviceContext),
        *(backward_cache.UseCount, backward_cache.UseHandle),
        *(linear.Linear, linear.ScaledLinear, norm.TokenNorm, activation.Smooth),
        *(attention.FlashCPU, multiply.Mul, matmul.MatMul, softmax.Softmax),
    ]
    objects = {
        **{kind.__name__: kind for kind in classes},
        "WHOLE": stash.WHOLE,
        "PRODUCT": linear.PRODUCT,
        "SUM": add.SUM,
        "held": tensors.held,
        "backward_cache": backward_cache.backward_cache,
        "is_fsdp_module": sharded_parameters.is_fsdp_module,
        "forward_ad": vars(forward_ad),
        "compiler": vars(torch.compiler),
        "functional": vars(F),
        "eval_frame_callback": torch._C._dynamo.eval_frame.get_eval_frame_callback,
    }
    stock = [(kind, kind.forward, name, getattr(F, name), number) for kind, name, number in _STOCK]
    module.set_up(objects, ROWS, {**table.ROWS, **table.EAGER}, NOTHING, stock)
