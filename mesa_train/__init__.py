"""mesa_train: train Vision Transformers in a third of the activation memory, with an exact forward.

    model = mesa_train.wrap(model)

`import mesa_train` needs torch alone, starts no device and compiles nothing.
"""

from typing import TYPE_CHECKING, Any

from .checkpoint import checkpoint
from .intercept import compress
from .policy import PRESETS, Policy
from .wrap import unwrap, wrap

if TYPE_CHECKING:
    from .memory.coverage import Coverage, coverage
    from .memory.footprint import Footprint, footprint
    from .memory.planner import plan
    from .memory.plans import OverBudget, Plan

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Coverage",
    "Footprint",
    "OverBudget",
    "Plan",
    "Policy",
    "checkpoint",
    "compress",
    "coverage",
    "footprint",
    "plan",
    "unwrap",
    "wrap",
]

# Imported on first use: they are tools, and a training run needs neither.
_LATER = {
    "Coverage": "coverage",
    "coverage": "coverage",
    "Footprint": "footprint",
    "footprint": "footprint",
    "OverBudget": "plans",
    "Plan": "plans",
    "plan": "planner",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'mesa_train' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".memory.{_LATER[name]}", __name__), name)
