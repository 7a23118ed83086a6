"""The gradients of a captured step: one static tensor for each parameter, shared by all graphs.

The first graph of a step without accumulation begins with no gradients. Its backward creates them
in the graph's memory and overwrites them in each replay. All other graphs add to these tensors.

Cost: one tensor for each parameter, as in a plain loop. A user may set gradients to None; each step
puts the static tensors back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import CaptureError


class Gradients:
    """The static gradients of a model.

    Args:
        model: the model. Parameters that need a gradient now are trained.
    Attributes:
        bound: whether the tensors are final.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters: list[nn.Parameter] = [p for _, p in named]
        self._all = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
        self._static: list[Tensor | None] = [None] * len(named)
        self._addresses: list[int] = []
        self.bound = False

    def remove(self) -> None:
        """Set each gradient to None. The next backward creates new tensors."""
        for parameter in self.parameters:
            parameter.grad = None

    def attach(self) -> None:
        """Make the static tensors the parameters' gradients, if they are bound.

        Raises:
            CaptureError: a parameter has a gradient now and had none when the tensors were bound.
        """
        if not self.bound:
            return
        for name, parameter, static in zip(self.names, self.parameters, self._static, strict=True):
            found = parameter.grad
            if found is static:
                continue
            if static is None:
                raise CaptureError(
                    f"{name} has a gradient in some steps only; all batches must train the same "
                    "parameters"
                )
            parameter.grad = static

    def zero(self) -> None:
        """Set the elements of the static tensors to zero."""
        torch._foreach_zero_([static for static in self._static if static is not None])

    def bind(self) -> None:
        """Take the parameters' present gradients as the static tensors."""
        self._static = self.present()
        self._addresses = [parameter.data_ptr() for _, parameter, _ in self._all]
        self.bound = True

    def present(self) -> list[Tensor | None]:
        """The parameters' present gradients."""
        return [parameter.grad for parameter in self.parameters]

    def restore(self, found: list[Tensor | None]) -> None:
        """Make `found`, from `present`, the parameters' gradients again."""
        for parameter, grad in zip(self.parameters, found, strict=True):
            parameter.grad = grad

    def drop(self) -> None:
        """Forget the static tensors."""
        self._static, self.bound = [None] * len(self.parameters), False

    def check(self) -> None:
        """Raise CaptureError if a parameter was moved, replaced, frozen or unfrozen since `bind`.

        A graph holds addresses. It would read and write freed memory.
        """
        for (name, parameter, trained), address in zip(self._all, self._addresses, strict=True):
            if parameter.data_ptr() != address:
                raise CaptureError(
                    f"{name} has other memory than in the capture; call reset() on the step after "
                    "weights were moved or exchanged"
                )
            if parameter.requires_grad is not trained:
                raise CaptureError(
                    f"{name}.requires_grad has changed since the capture; call capture_step again"
                )
