"""Find the models that an optimizer or a parallel wrapper takes, and wrap them.

`mesa-train run` uses this for scripts that do not know mesa_train. Python's garbage collector lists
all modules of the process. The model of a parameter is the outermost module that has the parameter.
If two outermost modules share a parameter, the finder refuses, with the names of both.

Cost: one pass over the objects of the process for each optimizer and each parallel wrapper, about
0.1 s.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.engine.bound import attributes_of
from mesa_train.engine.wrap import policy_of, wrap
from mesa_train.policy import Policy


class AmbiguousModel(ValueError):
    """Two modules may be the model, or none has the given name."""


class ModelFinder:
    """Wraps every model that an optimizer or a parallel wrapper takes while `watching`.

    Args:
        policy: the policy for all models.
        say: called with one line for each model.
        name: the class name of the model to wrap; None (default) for the outermost module.
        found: called with each model.

    Attributes:
        models: the models that were wrapped, in order.
    """

    def __init__(
        self,
        policy: Policy,
        say: Callable[[str], None] = lambda _: None,
        name: str | None = None,
        found: Callable[[nn.Module], None] = lambda _: None,
    ) -> None:
        self.policy, self.say, self.name, self.found = policy, say, name, found
        self.models: list[nn.Module] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[ModelFinder]:
        """Within the context, look at new optimizers, DDP, DataParallel, FSDP and `fully_shard`."""
        with contextlib.ExitStack() as stack:
            optimizer, parallel = torch.optim.Optimizer, nn.parallel
            stack.callback(_hooked(optimizer, "__init__", after=self._optimizer))
            stack.callback(_hooked(parallel.DataParallel, "__init__", before=self._wrapper))
            stack.callback(
                _hooked(parallel.DistributedDataParallel, "__init__", before=self._wrapper)
            )
            if torch.distributed.is_available():
                from torch.distributed import fsdp

                sharded = fsdp.FullyShardedDataParallel
                stack.callback(_hooked(sharded, "__init__", before=self._wrapper))
                stack.callback(_hooked(fsdp, "fully_shard", before=self._sharded))
            yield self

    def wrap_models_of(self, tensors: Iterable[Tensor], by: str) -> None:
        """Wrap the models that have these parameters.

        Args:
            tensors: parameters; those that are not trained are left out.
            by: the object that takes the parameters, for the line.

        Raises:
            AmbiguousModel: two modules have one of the parameters, and neither contains the other.
        """
        known = {id(p) for model in self.models for p in model.parameters()}
        wanted = {id(t) for t in tensors if t.requires_grad} - known
        for root in self._roots(wanted):
            if policy_of(root) is not None:
                self.say(f"the script wraps {describe(root)} itself: unchanged")
            else:
                wrap(root, self.policy)
                self.say(f"wrapped {describe(root)}, found at {by}")
            self.models.append(root)
            self.found(root)

    def _roots(self, wanted: set[int]) -> list[nn.Module]:
        """The outermost modules that have the parameters."""
        owners = [module for module in _modules() if _has_any(module, wanted)]
        if self.name is not None and owners:
            names = dict.fromkeys(type(module).__name__ for module in owners)
            owners = [module for module in owners if type(module).__name__ == self.name]
            if not owners:
                raise AmbiguousModel(
                    f"--model: no {self.name} has these parameters; choose from {', '.join(names)}"
                )
        inner = {
            id(child) for module in owners for child in module.modules() if child is not module
        }
        roots = [module for module in owners if id(module) not in inner]
        seen: dict[int, nn.Module] = {}
        for root in roots:
            for parameter in root.parameters():
                other = seen.setdefault(id(parameter), root)
                if id(parameter) in wanted and other is not root:
                    raise AmbiguousModel(_refusal(other, root))
        return roots

    def _optimizer(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Look at the parameters of a new optimizer."""
        tensors = [t for group in optimizer.param_groups for t in group["params"]]
        self.wrap_models_of(tensors, type(optimizer).__name__)

    def _wrapper(self, wrapper: Any, module: Any = None, *_: Any, **__: Any) -> None:
        """Look at the module of a new parallel wrapper."""
        if isinstance(module, nn.Module):
            self.wrap_models_of(module.parameters(), type(wrapper).__name__)

    def _sharded(self, module: Any = None, *_: Any, **__: Any) -> None:
        """Look at the module that `fully_shard` takes."""
        if isinstance(module, nn.Module):
            self.wrap_models_of(module.parameters(), "fully_shard")


def describe(model: nn.Module) -> str:
    """A model in words: `VisionTransformer (5.7 M parameters, 152 modules)`."""
    size = sum(parameter.numel() for parameter in model.parameters())
    count = f"{size / 1e6:.1f} M" if size >= 1e5 else f"{size:,}"
    modules = sum(1 for _ in model.modules())
    return f"{type(model).__name__} ({count} parameters, {modules} modules)"


def _refusal(first: nn.Module, second: nn.Module) -> str:
    """The message for two modules that share a parameter."""
    names = [type(first).__name__, type(second).__name__]
    if names[0] == names[1]:
        remedy = "call mesa_train.wrap in the script"
    else:
        remedy = "choose one with --model"
    return (
        f"{names[0]} and {names[1]} share a trained parameter, and neither contains the other: "
        f"{remedy}"
    )


def _modules() -> list[nn.Module]:
    """All living modules of the process whose constructor has run."""
    gc.collect()
    # `type`, not `isinstance`: reading the `__class__` of a proxy may run code.
    return [
        item
        for item in gc.get_objects()
        if issubclass(type(item), nn.Module) and "_modules" in attributes_of(item)
    ]


def _has_any(module: nn.Module, wanted: set[int]) -> bool:
    """True if a module or one of its submodules has one of the parameters."""
    return any(id(parameter) in wanted for parameter in module.parameters())


def _hooked(
    owner: Any,
    name: str,
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
) -> Callable[[], None]:
    """Call `before` or `after` at each call of a function, with its arguments.

    Args:
        owner: the class or module of the function.
        name: the function's name.
        before, after: the calls.

    Returns:
        A function that takes the calls away.
    """
    function = getattr(owner, name)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = function(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    setattr(owner, name, called)
    return lambda: setattr(owner, name, function)
