"""The operators under `torch.ops.mesa_train`, and `load()` for the native ones.

Importing this package defines every operator with its plain-torch reference, on any device, and
compiles nothing. `load()` puts the C++ kernels in front on the CPU; the first call of a machine
compiles them (15 to 45 s), the first call of a process loads them, the others cost nothing. It also
names the Triton kernels for GPUs, which are imported by the first call with a tensor on one.
"""

import threading

from . import schemas as schemas
from . import short_attention as short_attention
from .triton import schemas as _triton_schemas  # noqa: F401 - defines its operators

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


# torch.compiler.assume_constant_result, which would import all of torch._dynamo: a load() that is
# met while compiling runs then and there. Traced, the first one would change what Dynamo guards on.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]
