"""mesa_train: train Vision Transformers in a third of the activation memory, with an exact forward.

    model = mesa_train.wrap(model)

`import mesa_train` needs torch alone. It starts no device and compiles nothing.
"""

from typing import TYPE_CHECKING, Any

from . import moved_modules as _moved
from .api import plan, unwrap, wrap
from .engine.checkpoint import checkpoint
from .engine.intercept import compress
from .policy import PRESETS, Policy

if TYPE_CHECKING:
    from .graphs.checks import CaptureError
    from .graphs.step import CapturedStep, capture_step
    from .measure.coverage import Coverage, coverage
    from .measure.footprint import Footprint, footprint
    from .measure.out_of_memory import out_of_memory_notes
    from .planner.plan import OverBudget, Plan

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CaptureError",
    "CapturedStep",
    "Coverage",
    "Footprint",
    "OverBudget",
    "Plan",
    "Policy",
    "capture_step",
    "checkpoint",
    "compress",
    "coverage",
    "footprint",
    "out_of_memory_notes",
    "plan",
    "unwrap",
    "wrap",
]

_moved.install()

# Imported on first use. An ordinary training run needs none of these tools.
_LATER = {
    "CaptureError": "graphs.checks",
    "CapturedStep": "graphs.step",
    "capture_step": "graphs.step",
    "Coverage": "measure.coverage",
    "coverage": "measure.coverage",
    "Footprint": "measure.footprint",
    "footprint": "measure.footprint",
    "out_of_memory_notes": "measure.out_of_memory",
    "OverBudget": "planner.plan",
    "Plan": "planner.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'mesa_train' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
