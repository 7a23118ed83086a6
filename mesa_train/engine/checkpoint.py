"""`checkpoint`: torch's activation checkpointing, with the region's inputs kept as codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from mesa_train.policy import PRESETS, Policy
from mesa_train.stash.context import ModuleContext
from mesa_train.stash.recorder import Recorder

from .checkpoint_inputs import InputHooks
from .modes import innermost

_CHOICES = (8, 4, 2, 32)


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool = False,
    bits: int = 8,
    **kwargs: Any,
) -> Any:
    """`torch.utils.checkpoint.checkpoint` that keeps codes of its inputs. Needs no wrapped model; in
    one, an input whose codes are there already keeps nothing.

    function, args, kwargs: as torch's, with its keywords (`preserve_rng_state`, `context_fn`,
        `determinism_check`, `debug`). Coded are float tensors among `args` that need a gradient;
        tensors in `kwargs` are kept by the region itself.
    bits: 8, 4 or 2 bits per element, 32 for the tensors themselves. The recompute starts from the
        decoded inputs: the forward is exact, the gradient that of inputs half a code away.

    Raises ValueError for other `bits`, and what torch's raises. Traced by torch.compile, it is
    torch's own.
    """
    if bits not in _CHOICES:
        raise ValueError(f"bits must be one of {', '.join(map(str, _CHOICES))}, got {bits!r}")

    def run() -> Any:
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=use_reentrant, **kwargs
        )

    if bits == 32 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return run()
    around = innermost()
    recorder = Recorder(_context(bits))
    if around is not None:
        recorder.lineage, recorder.report = around.recorder.lineage, around.recorder.report
    with InputHooks(recorder):
        return run()


def _context(bits: int) -> ModuleContext:
    policy: Policy = dataclasses.replace(PRESETS["mesa8"], checkpoint_inputs=bits)
    return ModuleContext("", policy.rules([""])[""])
