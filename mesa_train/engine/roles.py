"""Modules with a role: what the patterns of `ROLES` mean in a model."""

from __future__ import annotations

import re

from torch import nn

# Classes such as LayerNorm, RmsNorm and LayerNorm2d. Batch and group norms normalise over tokens too.
_TOKEN_NORM = re.compile(r"^(?!.*(?:Batch|Group|Instance|Response|Weight|Spectral)).*Norm(?!al)")
# Classes such as DeformConv2d, DeformableConv2d and ModulatedDeformConv2dPack.
_DEFORMABLE_CONV = re.compile(r"Deform(able)?Conv")


def of_roles(modules: list[tuple[str, nn.Module]]) -> dict[str, set[str]]:
    """The names of the modules of each role.

    Args:
        modules: names and modules, in the order of registration.
    """
    norms = [name for name, module in modules if _is_token_norm(module)]
    linear = [name for name, module in modules if isinstance(module, nn.Linear)]
    deformable = [name for name, m in modules if _DEFORMABLE_CONV.search(type(m).__name__)]
    return {
        "last_norm": set(norms[-1:]),
        "last_linear": set(linear[-1:]),
        "deformable_conv": set(deformable),
    }


def _is_token_norm(module: nn.Module) -> bool:
    """True for a layer or RMS norm.

    A module whose children have parameters is not a norm, but a part that begins or ends with a norm.
    """
    return bool(_TOKEN_NORM.match(type(module).__name__)) and not any(
        next(child.parameters(), None) is not None for child in module.children()
    )
