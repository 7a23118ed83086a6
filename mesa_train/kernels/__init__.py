"""The operators under `torch.ops.mesa_train`, and `load()` for the native kernels.

An import of this package defines every operator with its plain-torch reference, on any device. It
compiles nothing. `load()` registers the C++ kernels on the CPU and the Triton kernels on GPUs.
Triton is imported at the first call with a tensor on a GPU.

Cost: the first `load()` on a machine compiles the C++ kernels (15 to 45 s). The first `load()` of a
process loads them. Other calls cost nothing.
"""

import threading

from . import schemas as schemas
from . import short_attention as short_attention
from .triton import schemas as _triton_schemas  # noqa: F401 - the import defines its operators

_lock = threading.Lock()
_loaded = False


def load() -> None:
    """Make the fastest kernels of this machine available. Idempotent and thread-safe."""
    global _loaded
    if _loaded:
        return
    with _lock:
        if not _loaded:
            from .cpu import build as cpu_build
            from .triton import load as triton_load

            cpu_build.load()
            triton_load.load()
            _loaded = True


# This mark has the effect of torch.compiler.assume_constant_result, which would import all of
# torch._dynamo. Dynamo runs a load() that it meets while compiling, and does not trace it. A traced
# first load() would change the state that Dynamo guards on.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]
