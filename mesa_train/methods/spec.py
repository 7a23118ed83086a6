"""Read the names of `mesa-train compare --methods`.

A method is a variant of the model (`plain`, a preset, checkpointing, a compiler...), an arithmetic
and an optimizer. Names are joined with "+": `mesa8+checkpoint`, `mesa8+adamw8bit`. The path of a
policy's YAML file is a name too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from mesa_train.policy import OFFLOADED, PRESETS, Policy

from . import approx_bp
from .apply import APPROX_BP, CHECKPOINT, CHECKPOINT_OFFLOAD, PLAIN, SAVE_ON_CPU
from .variants import COMPILE, FLOAT8, check_variant, float8_products

FLOAT32, PURE_BF16, ADAMW8BIT, OFFLOAD = "float32", "bf16", "adamw8bit", "offload"

DEFAULT = (
    FLOAT32,
    PLAIN,
    PURE_BF16,
    *PRESETS,
    CHECKPOINT,
    f"mesa8+{CHECKPOINT}",
    f"mesa8+{OFFLOAD}",
    SAVE_ON_CPU,
    CHECKPOINT_OFFLOAD,
    FLOAT8,
    APPROX_BP,
    f"{PLAIN}+{ADAMW8BIT}",
    f"mesa8+{ADAMW8BIT}",
    # Compiling takes longest, so the compiled methods come last: a time limit cuts them off first.
    COMPILE,
    "compile-budget-0.5",
    "compile-fp8",
    "compile:mesa8",
    "compile-budget-0.2",
)

_REDRAWS = (
    "budgets that recompute matmuls draw new dropout and stochastic-depth masks in the backward: a "
    "wrong gradient (pytorch#190758)"
)
_CAVEATS = {
    FLOAT32: "float32 throughout: the reference of the gradient",
    PURE_BF16: "bfloat16 weights, gradients and optimizer states: small updates are rounded away",
    CHECKPOINT: "exact; runs every block's forward twice",
    CHECKPOINT_OFFLOAD: "exact; runs every block's forward twice, from inputs in CPU memory",
    FLOAT8: "torchao: Linears multiply in 8-bit floats; another forward, and not less saved by itself",
    SAVE_ON_CPU: "exact; saved tensors are in CPU memory",
    APPROX_BP: f"GELU and SiLU save 2 bits, their derivative has four steps; {approx_bp.REMARK}",
    OFFLOAD: "stashes are in CPU memory; the saved bytes are those that stay on the GPU",
    "paper": "running ranges: in the first steps they are the ranges of few batches",
    "lossless": "exact; the engine without codes, for comparison",
    COMPILE: "exact except for the order of rounding; PyTorch's default partitioner",
    "compile-budget-0.5": "exact if masks are saved; recomputes elementwise operations",
    "compile-budget-0.2": _REDRAWS,
    "compile-fp8": "an undocumented pass of PyTorch: saved tensors in 8-bit floats (e4m3)",
    ADAMW8BIT: "optimizer states in 8 bits, except for weights of fewer than 4096 elements",
}
_CODES = "exact forward; the gradient is computed from codes"


@dataclasses.dataclass(frozen=True)
class MethodSpec:
    """A method of a comparison.

    Args:
        name: the name that the user gave.
        variant: the method for `Variant`.
        pure: dtype of weights and inputs, without autocast; None for the autocast of the
            comparison.
        eight_bit: AdamW with 8-bit states.
    """

    name: str
    variant: str | Policy
    pure: torch.dtype | None = None
    eight_bit: bool = False

    @classmethod
    def of(cls, name: str) -> MethodSpec:
        """Read the name of a method.

        Raises:
            ValueError: the name is unknown; the message has the choices.
            OSError: the policy's file does not exist.
        """
        rest, plus, last = name.rpartition("+")
        base = rest if last == ADAMW8BIT and plus else name
        pure = {FLOAT32: torch.float32, PURE_BF16: torch.bfloat16}.get(base)
        variant: str | Policy = PLAIN if pure is not None else base
        if base.endswith((".yaml", ".yml")):
            variant = Policy.from_yaml(base)
        elif pure is None:
            try:
                check_variant(base)
            except ValueError as error:
                raise ValueError(
                    f"{error}; or {FLOAT32}, {PURE_BF16}, a policy's .yaml, METHOD+{ADAMW8BIT}"
                ) from None
        return cls(name, variant, pure, base != name)

    @property
    def caveats(self) -> tuple[str, ...]:
        """Remarks for the reader of the method's numbers."""
        parts = (self.name, *self.name.split("+"), self.name.partition(":")[0])
        if self.variant == CHECKPOINT_OFFLOAD:
            parts = (CHECKPOINT_OFFLOAD, *self.name.split("+")[2:])
        caveats = dict.fromkeys(_CAVEATS[part] for part in parts if part in _CAVEATS)
        coded = isinstance(self.variant, Policy) or any(
            prefix in self.variant for prefix in ("mesa", "paper")
        )
        return ((_CODES,) if coded else ()) + tuple(caveats)

    def why_not(self, device: str) -> str | None:
        """The reason why the method has no effect on a device; None if it has an effect."""
        if (
            isinstance(self.variant, str)
            and self.variant in OFFLOADED
            and not device.startswith("cuda")
        ):
            return "needs a GPU: on a CPU all saved tensors are in CPU memory already"
        if self.variant == CHECKPOINT_OFFLOAD and not device.startswith("cuda"):
            return "needs a GPU: on a CPU all saved tensors are in CPU memory already"
        if self.variant == FLOAT8 and not (device.startswith("cuda") and float8_products()):
            return "needs a GPU that multiplies 8-bit floats (compute capability 8.9)"
        return None

    @property
    def compiled(self) -> bool:
        """True if the method uses torch.compile."""
        return isinstance(self.variant, str) and self.variant.startswith(COMPILE)

    @property
    def countable(self) -> bool:
        """True if its bytes can be counted on fake tensors."""
        return not self.compiled and self.variant not in (
            SAVE_ON_CPU,
            CHECKPOINT_OFFLOAD,
            FLOAT8,
        )

    def autocast(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype of autocast for this method.

        Args:
            dtype: the dtype of autocast of the comparison; None for no autocast.
        """
        return None if self.pure is not None else dtype

    def cast(self, model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
        """Cast the model (in place) and the inputs to the method's own dtype."""
        cast_inputs = self.narrowed(inputs)
        return (model if self.pure is None else model.to(self.pure)), cast_inputs

    def narrowed(self, inputs: Any) -> Any:
        """Cast the inputs to the method's own dtype."""
        dtype = self.pure
        if dtype is None:
            return inputs
        return pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make AdamW with learning rate 0: it does all of its work, but no weight changes.

        Raises:
            ImportError: bitsandbytes is missing for the 8-bit optimizer; the message says what to
                install.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.eight_bit:
            # Fused, because the temporaries of an unfused step could be the peak of the step.
            return torch.optim.AdamW(parameters, lr=0.0, fused=True)
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ImportError(
                "8-bit optimizers need bitsandbytes: pip install 'mesa_train[bitsandbytes]'"
            ) from error
        return AdamW8bit(parameters, lr=0.0)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's states."""
    states = pytree.tree_leaves(list(optimizer.state.values()))
    return sum(t.nbytes for t in states if isinstance(t, torch.Tensor))
