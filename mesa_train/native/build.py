"""The C++ extension of the native rows: compiled once per machine, and imported.

The extension needs Python's headers. It is one compilation unit, because torch's headers take most
of the time: 20 to 40 s on Zen 3. `utils/cpp_build.py` describes the cache and the compiler's environment
variables.

Environment:
    MESA_TRAIN_NATIVE=0  run the Python rows
"""

import importlib.util
import logging
import os
import sysconfig
from pathlib import Path
from types import ModuleType

from mesa_train.utils.cpp_build import BuildError, Library

_HERE = Path(__file__).parent
_NAME = "mesa_train_native"
_HEADERS = sysconfig.get_paths()["include"]
LIBRARY = Library(
    name="native",
    units=((_HERE / "module.cpp", ()),),
    sources=(*sorted(_HERE.glob("*.cpp")), *sorted(_HERE.glob("*.h"))),
    compiler_bytes=1100 << 20,
    includes=(_HEADERS,),
    libraries=("torch_python", "torch", "torch_cpu", "c10"),
)

logger = logging.getLogger(__name__)


def load() -> ModuleType | None:
    """Import the extension, and compile it if needed.

    Returns:
        The module. None, after one line in the log, if that fails or the user has disabled it.
    """
    if os.environ.get("MESA_TRAIN_NATIVE", "1") == "0":
        return None
    try:
        if not (Path(_HEADERS) / "Python.h").exists():
            raise BuildError(f"Python's headers are missing: no Python.h in {_HEADERS}")
        spec = importlib.util.spec_from_file_location(_NAME, LIBRARY.path())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (BuildError, OSError, ImportError) as error:
        logger.warning(
            "mesa_train runs its operators in Python: the results are the same, and steps of small "
            "models and steps on fast GPUs take longer. To fix it, "
            "install a C++20 compiler (g++ 11 or later) and Python's headers (the package "
            "python3-dev on Debian and Ubuntu); to silence this, set MESA_TRAIN_NATIVE=0. The "
            "reason: %s",
            error,
        )
        return None
    return module
