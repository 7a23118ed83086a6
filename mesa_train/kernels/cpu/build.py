"""The C++ kernels of the CPU: compiled once per machine, and loaded.

The kernels replace the reference on the CPU. In total their sources compile in 44 s on Zen 3, and
the longest part takes 13 s. `utils/cpp_build.py` describes the cache and the compiler's environment
variables.

Environment:
    MESA_TRAIN_CPU_KERNELS=0  use the plain-torch reference
"""

import logging
import os
from pathlib import Path

import torch

from mesa_train.utils.cpp_build import BuildError, Library

_HERE = Path(__file__).parent
# Fewer units would be less work in total, because each unit reads torch's headers again.
LIBRARY = Library(
    name="cpu",
    units=(
        (_HERE / "decode.cpp", ()),
        (_HERE / "encode.cpp", ()),
        (_HERE / "passes.cpp", ("-DMESA_DTYPE=BFloat16",)),
        (_HERE / "passes.cpp", ("-DMESA_DTYPE=Float16",)),
        (_HERE / "passes.cpp", ("-DMESA_DTYPE=Float32",)),
    ),
    sources=(*sorted(_HERE.glob("*.cpp")), *sorted(_HERE.glob("*.h"))),
    compiler_bytes=640 << 20,
)

logger = logging.getLogger(__name__)


def load() -> bool:
    """Load the C++ kernels, and compile them if needed.

    Returns:
        True if the kernels are loaded. False, after one warning, if that fails or the user has
        disabled them.
    """
    if os.environ.get("MESA_TRAIN_CPU_KERNELS", "1") == "0":
        return False
    try:
        torch.ops.load_library(str(LIBRARY.path()))
    except (BuildError, OSError, RuntimeError) as error:
        logger.warning(
            "mesa_train runs without its C++ kernels: the plain-torch reference gives the same "
            "results about ten times slower. To fix it, install a C++20 compiler (g++ 11 or later) "
            "or name one in CXX, and name a writable directory in MESA_TRAIN_CACHE if that is what "
            "is missing; to silence this, set MESA_TRAIN_CPU_KERNELS=0. The reason: %s",
            error,
        )
        return False
    return True
