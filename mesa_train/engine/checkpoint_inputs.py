"""What activation checkpointing itself keeps: the inputs of each region, as codes.

A checkpoint saves its inputs through the saved-tensor hooks around it, so a hook that codes them is all
there is to it: 1 byte per element at 8 bits instead of 2 or 4, and nothing where the input has a stash
already (behind a norm that is kept anyway). The recompute starts from the decoded input. Only inputs
that carry a gradient are coded: a mask or an index stays what it is.
"""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor

from mesa_train.ops.fallback import Packed, unpack
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import Spec, Stash, strip

_CHECKPOINT = "torch.utils.checkpoint"


class InputHooks(torch.autograd.graph.saved_tensors_hooks):
    """Context manager: inputs of checkpoints that begin inside are coded by `recorder`'s rule for
    `checkpoint.input`; whatever else is saved passes. Hooks that were on before get the codes."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        # `stash.recorder.beneath` reads it: the hooks that were on before.
        self.mesa_train_outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        super().__init__(self._pack, unpack)

    def _pack(self, tensor: Tensor) -> Packed:
        # Detached: an output that its own node keeps would hold the node, which holds the output.
        tensors: list[Tensor] = [tensor if tensor.grad_fn is None else tensor.detach()]
        spec: Spec | None = None
        if tensor.requires_grad and tensor.is_floating_point() and _saved_by_checkpoint():
            with torch.no_grad():
                kept: Stash = self.recorder.keep(tensor, "checkpoint", "input")
            tensors = []
            spec = strip(kept, tensors, {}, {})
        return Packed.of(tensors, spec, self.mesa_train_outer)


def _saved_by_checkpoint() -> bool:
    """Whether a checkpoint is what saves: the first Python frame below the hook's, but for autograd's
    own `Function.apply`."""
    frame: types.FrameType | None = sys._getframe(2)
    if frame is not None and frame.f_globals.get("__name__") == "torch.autograd.function":
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == _CHECKPOINT
