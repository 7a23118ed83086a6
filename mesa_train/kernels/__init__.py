"""The operators under `torch.ops.mesa_train`, and `load()` for the native ones.

Importing this package defines every operator with its plain-torch reference, on any device, and
compiles nothing. `load()` puts the C++ kernels in front on the CPU; the first call of a machine
compiles them (15 to 45 s), the first call of a process loads them, the others cost nothing. It also
names the Triton kernels for GPUs, which are imported by the first call with a tensor on one.
"""

import threading

from mesa_train.kernels import schemas as schemas
from mesa_train.kernels import short_attention as short_attention
from mesa_train.kernels import triton_schemas as triton_schemas

_lock = threading.Lock()
_loaded = False


def load() -> None:
    """Make the fastest kernels of this machine available. Idempotent and thread-safe."""
    global _loaded
    if _loaded:
        return
    with _lock:
        if not _loaded:
            from mesa_train.kernels import cpu_build, triton_load

            cpu_build.load()
            triton_load.load()
            _loaded = True


# torch.compiler.assume_constant_result, which would import all of torch._dynamo: a load() that is
# met while compiling runs then and there. Traced, the first one would change what Dynamo guards on.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]
