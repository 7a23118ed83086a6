"""Record which storages autograd holds at the end of a forward, and which operator saved them.

Every saved tensor goes through the pack hook of `torch.autograd.graph.saved_tensors_hooks`. The
result of the hook exists exactly as long as the graph node that saved the tensor. Therefore the
hook returns a token for each saved tensor, and only the tokens that exist when the output is there
count. A branch of the graph that was dropped during the forward costs nothing.

A token holds the storage, so no address is used twice. Each storage is counted once, at its full
size, for the operator that saved it first.

Cost: the forward itself plus a Python call per torch call; no memory beyond the memory of training.
"""

from __future__ import annotations

import contextlib
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from mesa_train.stash.offload import onlooker

WEIGHT_CAST = "weight cast"
_UNNAMED = "other"


class SavedStorage(NamedTuple):
    """One storage saved for the backward.

    Args:
        operator: the operator that saved the storage first.
        module: qualified name of its module.
        dtype: dtype of the saved tensor.
        shape: shape of the saved tensor.
        saved_bytes: full size of the storage.
        offloaded: whether it is in CPU memory until the backward.
    """

    operator: str
    module: str
    dtype: str
    shape: tuple[int, ...]
    saved_bytes: int
    offloaded: bool = False


class _Token:
    """Exists as long as the graph node that saved a tensor.

    It holds the storages, not the tensor. The tensor may be the node's own output, and then the
    cycle is never freed.
    """

    __slots__ = ("__weakref__", "module", "operator", "parts")

    def __init__(self, operator: str, module: str, tensor: Tensor) -> None:
        self.operator = operator
        self.module = module
        self.parts = [
            (
                t.untyped_storage(),
                str(t.dtype).removeprefix("torch."),
                # A nested tensor has no shape, only a number of elements.
                (t.numel(),) if t.is_nested else tuple(t.shape),
                t.device.type,
            )
            for t in _plain_tensors(tensor)
        ]


class Recorder:
    """Records saved tensors: `with recorder.recording(model): output = model(x)`.

    Then call `storages()` while `output` exists.
    """

    def __init__(self) -> None:
        self.operator: str | None = None
        self._modules: list[str] = []
        self._tokens: list[weakref.ref[_Token]] = []
        self._weights: dict[int, torch.UntypedStorage] = {}
        self._ignored: dict[int, torch.UntypedStorage] = {}
        self._casts: dict[int, torch.UntypedStorage] = {}
        self._devices: set[str] = set()

    @contextlib.contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Within the context, record every tensor saved for the backward.

        Args:
            model: the module whose forward runs. Its parameters and buffers do not count.
        """
        self._weights = by_address(model.parameters())
        self._ignored = {**self._weights, **by_address(model.buffers())}
        self._devices = {t.device.type for t in (*model.parameters(), *model.buffers())}
        with contextlib.ExitStack() as stack:
            for name, module in model.named_modules():
                enter, leave = self._module_hooks(name)
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, _no_backward))
            stack.enter_context(_Operators(self))
            # Under a dispatch mode compiled code does not run compiled: compiled models run without
            # this mode.
            if not any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in model.modules()):
                stack.enter_context(_WeightCasts(self._weights, self._casts))
            yield

    def name_functions(self, outputs: Iterable[Tensor]) -> None:
        """Name the tensors that a `torch.autograd.Function` of another library saved after its class.

        No torch function mode and no frame of the Python stack shows such a Function. Its node in
        the graph does.

        Args:
            outputs: of the recorded forward.
        """
        nodes: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            for saved in getattr(node, "_raw_saved_tensors", ()):
                if isinstance(saved.data, _Token) and saved.data.operator == _UNNAMED:
                    saved.data.operator = node._forward_cls.__name__
            behind = {n for n, _ in node.next_functions if n is not None} - seen
            seen |= behind
            nodes += behind

    def storages(self) -> list[SavedStorage]:
        """The storages that autograd holds now, each once, in the order of the forward."""
        seen: set[int] = set()
        rows = []
        for reference in self._tokens:
            token = reference()
            if token is None:
                continue
            for storage, dtype, shape, device in token.parts:
                address, size = storage._cdata, storage.nbytes()
                if address in seen or address in self._ignored or not size:
                    continue
                seen.add(address)
                operator = WEIGHT_CAST if address in self._casts else token.operator
                # Fake CPU tensors that stand for GPU tensors are offloaded to the meta device.
                elsewhere = bool(self._devices) and device not in self._devices
                offloaded = elsewhere and device in ("cpu", "meta")
                rows.append(SavedStorage(operator, token.module, dtype, shape, size, offloaded))
        return rows

    @onlooker
    def _pack(self, tensor: Tensor) -> _Token:
        """The pack hook: a token for a saved tensor."""
        module = self._modules[-1] if self._modules else ""
        token = _Token(self.operator or _operator_on_stack(), module, tensor)
        self._tokens.append(weakref.ref(token))
        return token

    def _module_hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks that record the innermost running module."""

        def enter(*_: Any) -> None:
            self._modules.append(name)

        def leave(*_: Any) -> None:
            self._modules.pop()

        return enter, leave


class _Operators(TorchFunctionMode):
    """Records the name of the torch function that runs; the outer one of two nested functions."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outer, self.recorder.operator = self.recorder.operator, operator_name(func)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.recorder.operator = outer


class _WeightCasts(TorchDispatchMode):
    """Records autocast's copies of parameters, which a torch function mode does not see."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile run under this mode, as eager `flex_attention` needs."""
        return True

    def __init__(
        self, weights: dict[int, torch.UntypedStorage], casts: dict[int, torch.UntypedStorage]
    ) -> None:
        super().__init__()
        self.weights = weights
        self.casts = casts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and not is_traceable_wrapper_subclass(args[0]):
            source, cast = args[0].untyped_storage(), output.untyped_storage()
            if source._cdata in self.weights:
                self.casts[cast._cdata] = cast
        return output


def operator_name(func: Callable[..., Any]) -> str:
    """A torch function's plain name: `linear`, `mul` for `Tensor.__rmul__`, `relu` for `relu_`."""
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__"):  # A property, such as Tensor.T.
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    name = name.strip("_")
    arithmetic = re.fullmatch(r"[ri]?(add|sub|mul|truediv|div|matmul|pow)", name)
    return {"truediv": "div"}.get(arithmetic[1], arithmetic[1]) if arithmetic else name


def _operator_on_stack() -> str:
    """The operator that saves, if the mode here saw no torch function.

    mesa_train's own mode is entered later, so PyTorch calls it first, and it saves tensors itself.
    Checkpointing saves from plain Python. Both have a frame on the Python stack between this
    function and the call of the module. A `torch.autograd.Function` of another library has none:
    `Recorder.name_functions` names it later.
    """
    name = _UNNAMED
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "_call_impl":
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return "checkpoint"
        if frame.f_code.co_name == "__torch_function__" and callable(frame.f_locals.get("func")):
            name = operator_name(frame.f_locals["func"])
        frame = frame.f_back
    return name


def _plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the data: the parts of a wrapper subclass or sparse tensor.

    A plain strided tensor is its own part; other layouts have none.
    """
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [inner for name in names for inner in _plain_tensors(getattr(tensor, name))]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout is not torch.strided:
        return []
    return [tensor]


def by_address(tensors: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of tensors, and of the parts of wrapper subclasses, each once, by address."""
    storages = [inner.untyped_storage() for t in tensors for inner in _plain_tensors(t)]
    return {storage._cdata: storage for storage in storages}


def _no_backward(_: _Token) -> Tensor:
    """The unpack hook: a measured forward has no backward."""
    raise RuntimeError("a measured forward saves no tensors, so it has no backward")
