"""Saved-tensor hooks that code the inputs of activation checkpoints.

A checkpoint saves the inputs of its region through the saved-tensor hooks that are active around
it. So one hook that codes these inputs is enough. The recompute starts from the decoded input. Only
inputs that carry a gradient are coded; a mask or an index stays uncompressed.

Cost: 1 byte per element at 8 bits, instead of 2 or 4. An input that has a stash already (such as
the input behind a norm that is saved anyway) costs nothing.
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
    """Context manager: code the inputs of checkpoints that begin inside it.

    The rule is the `recorder`'s rule for `checkpoint.input`. All other saved tensors pass
    unchanged. Hooks that were active before get the codes.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        # The hooks that were active before. `stash.recorder.beneath` reads this attribute.
        self.mesa_train_outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        super().__init__(self._pack, unpack)

    def _pack(self, tensor: Tensor) -> Packed:
        """The pack hook: codes of a checkpoint's input, or the tensor itself."""
        # Detached, because an output that its own node saves would form a cycle: the output holds
        # the node, and the node holds the output.
        tensors: list[Tensor] = [tensor if tensor.grad_fn is None else tensor.detach()]
        spec: Spec | None = None
        # PyTorch 2.11 also saves an empty tensor.
        coded = tensor.requires_grad and tensor.is_floating_point() and tensor.numel() > 0
        if coded and _saved_by_checkpoint():
            with torch.no_grad():
                kept: Stash = self.recorder.keep(tensor, "checkpoint", "input")
            tensors = []
            spec = strip(kept, tensors, {}, {})
        return Packed.of(tensors, spec, self.mesa_train_outer)


def _saved_by_checkpoint() -> bool:
    """True if a checkpoint saves the tensor.

    The test reads the first Python frame below the hook's frame, and skips autograd's own
    `Function.apply`.
    """
    frame: types.FrameType | None = sys._getframe(2)
    if frame is not None and frame.f_globals.get("__name__") == "torch.autograd.function":
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == _CHECKPOINT
