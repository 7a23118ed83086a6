"""Prepare one model once for each method; all variants share the same Parameters.

`torch.compile` compiles a model once, so a compiled method cannot be put on and taken off around
every step, as `applied` does. A variant is a copy of the modules that shares parameters and buffers
with the original. So the copies cost hardly any memory, one optimizer steps them all, and they can
run in turns within a process.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.engine.wrap import unwrap
from mesa_train.policy import OFFLOADED, PRESETS, Policy
from mesa_train.stash.offload import onlooker

from .apply import (
    APPROX_BP,
    BOTH,
    CHECKPOINT,
    CHECKPOINT_OFFLOAD,
    CODED,
    PLAIN,
    SAVE_ON_CPU,
    check_method,
    put_on,
    running,
)

COMPILE = "compile"
FLOAT8 = "float8"

# PyTorch's own pass that casts the saved tensors of a compiled backward to 8-bit floats. It is
# undocumented, so its options are here. The size threshold is 0: with the default of 100 MB, the
# pass would skip all tensors of a small ViT.
_FP8 = {
    "activation_quantization_aten_pass": {
        "quant_type": "torch.float8_e4m3fn",
        "size_in_mb": 0,
        "use_scaling": True,
        "exclude_primals": True,
        "allowed_dtypes": "torch.bfloat16;torch.float32",
    }
}

# method: (activation_memory_budget, inductor's post_grad_fusion_options). 0.5 is the smallest
# budget with which a ViT recomputes only elementwise operations; 0.2 recomputes matmuls.
_COMPILED: dict[str, tuple[float, dict[str, Any]]] = {
    COMPILE: (1.0, {}),
    "compile-budget-0.5": (0.5, {}),
    "compile-budget-0.2": (0.2, {}),
    "compile-fp8": (0.9, _FP8),
    **{f"{COMPILE}:{preset}": (1.0, {}) for preset in PRESETS if preset != "paper"},
}

CHOICES = (
    PLAIN, CHECKPOINT, CHECKPOINT_OFFLOAD, SAVE_ON_CPU, FLOAT8, APPROX_BP,
    *PRESETS, *BOTH, *CODED, *OFFLOADED, *_COMPILED,
)  # fmt: skip


def check_variant(method: str) -> None:
    """Check the name of a method.

    Raises:
        ValueError: the name is unknown; the message has the choices and the closest name.
    """
    check_method(method, (SAVE_ON_CPU, CHECKPOINT_OFFLOAD, FLOAT8, *_COMPILED))


class Variant:
    """A model with one method; call it within `active()`.

    Args:
        model: the module; it does not change. The variant shares its parameters and buffers.
        method: one of `CHOICES`, or a Policy.

    Raises:
        ValueError: the method is unknown.
        NoBlocks: the method checkpoints blocks and the model has none.
    """

    def __init__(self, model: nn.Module, method: str | Policy) -> None:
        if isinstance(method, str):
            check_variant(method)
        self.method = method
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.module = unwrap(copy.deepcopy(model, shared))
        eager_method = method.removeprefix(f"{COMPILE}:") if isinstance(method, str) else method
        # Never closed: the copy stays checkpointed.
        self._installed = contextlib.ExitStack()
        plain = eager_method in _COMPILED or eager_method == FLOAT8
        put_on(self.module, PLAIN if plain else eager_method, self._installed)
        if method == FLOAT8:
            _use_float8(self.module)
        if method in _COMPILED:
            self.module.compile(backend=_backend(*_COMPILED[method]), dynamic=False)

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Within the context, the returned module runs forward and backward with the method."""
        with running(self.module, self.method):
            yield self.module

    def saved_bytes(self, run: Callable[[nn.Module], Tensor]) -> int:
        """Bytes saved for the backward, each storage once, without parameters and buffers.

        Args:
            run: from the module to the loss. It is called twice, because a compiled module compiles
                first.
        """
        weights = {
            t.untyped_storage().data_ptr()
            for t in (*self.module.parameters(), *self.module.buffers())
        }
        tokens: list[weakref.ref[_Token]] = []
        copies = 0

        @onlooker
        def pack(tensor: Tensor) -> _Token:
            nonlocal copies
            copies += tensor.nbytes
            token = _Token(tensor)
            tokens.append(weakref.ref(token))
            return token

        with self.active() as module:
            run(module).backward()
            for parameter in module.parameters():
                parameter.grad = None
            with torch.autograd.graph.saved_tensors_hooks(pack, _no_backward):
                loss = run(module)
        alive = [token for token in (reference() for reference in tokens) if token is not None]
        del loss
        if self.method == SAVE_ON_CPU:
            return copies  # save_on_cpu copies every saved tensor, each time that it is saved.
        storages = {token.storage.data_ptr(): token.storage.nbytes() for token in alive}
        return sum(size for address, size in storages.items() if address not in weights)


def _use_float8(model: nn.Module) -> None:
    """Let every Linear of a fitting size multiply in 8-bit floats, with torchao; in place.

    The new Linears have the same Parameters. Without a GPU that has such products, torchao computes
    the same numbers in float32.

    Raises:
        ImportError: torchao is missing; the message says what to install.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError("float8 needs torchao: pip install torchao") from error
    config = Float8LinearConfig(emulate=not float8_products())
    # The kernels take sizes that are multiples of 16.
    convert_to_float8_training(
        model,
        config=config,
        module_filter_fn=lambda module, _: (
            isinstance(module, nn.Linear)
            and module.in_features % 16 == 0
            and module.out_features % 16 == 0
        ),
    )


def float8_products() -> bool:
    """True if the GPU multiplies 8-bit floats (compute capability 8.9)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


class _Token:
    """Exists as long as the graph node that saved a tensor, and holds its storage."""

    __slots__ = ("__weakref__", "storage")

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()


def _no_backward(_: _Token) -> Tensor:
    """The unpack hook: this forward has no backward."""
    raise RuntimeError("this forward only counted its saved tensors, so it has no backward")


def _backend(budget: float, fusion: dict[str, Any]) -> Callable[..., Any]:
    """Inductor with these options.

    Each call makes a new function. So torch.compile does not reuse the code that it compiled for
    another variant of the same model.
    """

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._functorch import config as functorch
        from torch._inductor import config as inductor
        from torch._inductor.compile_fx import compile_fx

        with (
            functorch.patch(activation_memory_budget=budget),
            inductor.patch(post_grad_fusion_options=fusion),
        ):
            return compile_fx(graph, inputs)

    return compile_graph
