"""Codecs: how the elements of a stash are stored. `of` picks the one that a rule asks for."""

from __future__ import annotations

import functools
from typing import Any

from ..policy import Rule
from .lossless import Lossless


def of(rule: Rule, site: Any, operator: str, operand: str) -> Any:
    """The codec for one operand: lossless, running ranges bound to the module, or affine."""
    if rule.bits == 32:
        return _LOSSLESS
    if rule.running:
        from .running import Running

        return Running.at(site, operator, operand, rule)
    return _affine(rule.bits, rule.group_size, rule.stochastic)


_LOSSLESS = Lossless()


@functools.cache
def _affine(bits: int, group_size: int, stochastic: bool) -> Any:
    from .affine import Affine

    return Affine(bits, group_size, stochastic, 0)
