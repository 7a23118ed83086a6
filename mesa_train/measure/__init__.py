"""Measure a model: saved tensors, coverage, peak memory, timeline and time of a step, profile."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .profiling.profile import Profile, profile

__all__ = ["Profile", "profile"]


def __getattr__(name: str) -> Any:
    # Imported on first use: a profile imports more of the package than the other modules here do.
    if name not in __all__:
        raise AttributeError(f"module 'mesa_train.measure' has no attribute {name!r}")
    from .profiling import profile

    return getattr(profile, name)
