"""`checkpoint`: torch's activation checkpointing that saves codes of the region's inputs.

torch's own checkpoint saves the inputs themselves. Codes take 1 byte per element at 8 bits instead
of 2 or 4. `checkpoint_inputs.py` says how the inputs are coded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from mesa_train.policy import BITS, PRESETS, Policy
from mesa_train.stash.context import ModuleContext
from mesa_train.stash.recorder import Recorder

from .checkpoint_inputs import InputHooks
from .modes import innermost


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool = False,
    bits: int = 8,
    **kwargs: Any,
) -> Any:
    """Run `torch.utils.checkpoint.checkpoint` and save codes of the region's inputs.

    The model need not be wrapped. In a wrapped model, an input that has codes already saves nothing
    more. If torch.compile traces the call, it is torch's own checkpoint.

    Args:
        function: the region, as for torch's checkpoint.
        args: arguments of `function`. Float tensors among them that need a gradient are coded.
        use_reentrant: as for torch's checkpoint; default False.
        bits: 8, 6, 5, 4, 3 or 2 bits per element; 32 saves the tensors themselves; default 8. The recompute
            starts from the decoded inputs. So the forward is exact, and the gradient is the
            gradient at inputs that differ by at most half a code.
        kwargs: arguments of `function`, which the region itself saves, and torch's keywords
            (`preserve_rng_state`, `context_fn`, `determinism_check`, `debug`).
    Returns:
        The output of `function`.
    Raises:
        ValueError: `bits` is not one of the choices. Also any error of torch's checkpoint.
    """
    if not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")

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
    """A module context without a module that codes checkpoint inputs at `bits`."""
    policy: Policy = dataclasses.replace(PRESETS["mesa8"], checkpoint_inputs=bits)
    return ModuleContext("", policy.rules([""])[""])
