"""Measure a model: saved tensors, coverage, peak memory, a timeline of one step, its time, and a profile for plans."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .profiling.profile import Profile, profile

__all__ = ["Profile", "profile"]


def __getattr__(name: str) -> Any:
    # On first use: a profile needs more of the package than the modules beside it do.
    if name not in __all__:
        raise AttributeError(f"module 'mesa_train.measure' has no attribute {name!r}")
    from .profiling import profile

    return getattr(profile, name)
