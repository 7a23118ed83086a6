"""The recorder: saves tensors for the backward of one forward, by the policy's rules.

An operator calls the recorder with a tensor (`keep`). The recorder returns the tensor's stash: a stash from the
lineage, new codes, or the tensor itself. The operators use only the recorder. They use neither the policy nor the
torch function mode (`engine/intercept.py`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mesa_train.codecs import bitmask
from mesa_train.codecs.affine import Affine
from mesa_train.codecs.lossless import Lossless
from mesa_train.codecs.placeholder import (
    PlaceholderCodec,
    SACHiddenCodec,
    bits,
    discards,
    selective,
    unseen,
)
from mesa_train.codecs.running import Running
from mesa_train.policy import VIEW, Rule

from .context import ModuleContext, Report
from .lineage import Lineage, TracedLineage
from .offload import OffloadedStash, Order, offload_stream_of, passes
from .sharded_parameters import zero3_hooked
from .stash import Leaf, MatrixLayout, Stash, uncompressed
from .tensors import (
    autocasts,
    frozen,
    held,
    holds_more_than_itself,
    is_plain,
    new_bytes,
    of_parameter,
    saved_with_its_base,
)


class Recorder:
    """Saves tensors for the backward as `context` says.

    Attributes:
        report: counts the saved bytes.
        step: the number of the optimizer step, for running ranges.
        traced: whether torch.compile traces the frame that made the recorder.
        hooks: the active pack hook.
    """

    def __init__(self, context: ModuleContext, report: Report | None = None, step: int = 0) -> None:
        self.traced = torch.compiler.is_compiling()
        self.context = context
        self.report = report if report is not None else Report()
        self.zero3_hooked = not self.traced and zero3_hooked(context.module)
        # For running ranges: the optimizer step, and how often each operand was saved.
        self.step = step
        self.uses: dict[tuple[str, str, str], int] = {}
        # The leaves that were offloaded to CPU memory.
        self.order: Order = []
        self.begin(saved_hooks())

    def begin(self, hooks: Any) -> None:
        """Start with an empty lineage. `hooks`: the pack hook that is active from now on."""
        self.hooks = hooks
        self.lineage: Lineage[Stash] = (
            TracedLineage() if self.traced else Lineage(self.zero3_hooked)
        )
        # Whether native rows may use this recorder. The passes of a checkpoint and ZeRO-3 need
        # Python rows.
        self.native = (
            not self.traced
            and not self.zero3_hooked
            and (hooks is None or hasattr(hooks, "mesa_train_onlooker"))
        )
        # The operands of a Linear, by its output, for a layer scale that follows the Linear.
        self.linears: Lineage[tuple[Tensor, int, Stash, Tensor, Tensor | None]]
        self.linears = TracedLineage() if self.traced else Lineage()
        # The factors of a product with a number, by the product: the tensor and its version, and
        # the number. Empty while tracing.
        self.multiples: Lineage[tuple[weakref.ref[Tensor], int, float]]
        self.multiples = TracedLineage() if self.traced else Lineage()
        # The outputs of log_softmax, and their products with targets (`ops/losses/log_softmax.py`).
        self.log_softmaxes: Lineage[Any] = TracedLineage() if self.traced else Lineage()
        self.weighted: Lineage[Any] = TracedLineage() if self.traced else Lineage()

    def covers(self, operator: str, *tensors: Tensor | None) -> bool:
        """True if an operator's row applies.

        The operator must be enabled here, a tensor must need a gradient, and all tensors must be plain floats.
        """
        if not self.context.rules.operators[operator]:
            return False
        gradient = False
        for tensor in tensors:
            if tensor is None:
                continue
            if not (isinstance(tensor, Tensor) and tensor.is_floating_point() and is_plain(tensor)):
                return False
            gradient = gradient or tensor.requires_grad
        return gradient

    def exactly(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `func` as PyTorch does, without recording.

        Autocast must not cache the casts that it makes here. Otherwise a later call would use a copy of the weight
        that has no gradient.
        """
        if self.traced:
            with torch.no_grad():
                return func(*args, **kwargs)
        cached = torch._C._is_any_autocast_enabled() and torch.is_autocast_cache_enabled()
        # `torch.no_grad()` takes 4 us.
        torch._C._set_grad_enabled(False)
        if cached:
            torch.set_autocast_cache_enabled(False)
        try:
            return func(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)
            if cached:
                torch.set_autocast_cache_enabled(True)

    def keep(
        self,
        tensor: Tensor,
        operator: str,
        operand: str,
        within: tuple[int, ...] = (-1,),
        label: str = "",
    ) -> Stash:
        """Save `tensor` as `operand` of `operator`.

        Args:
            within: the dims that one group of codes may span (see `MatrixLayout`); default: the last dim.
            label: the operator's name in reports; default: `operator`.
        Returns:
            The stash of the tensor: a shared stash, a new leaf, or the tensor itself.
        """
        label = label or operator
        rule = self.context.rules.table[operator, operand]
        known = self.lineage.get(tensor)
        if known is not None and rule.enabled and known.cost <= rule.limit:
            if not self.traced:
                how = "shared" if known.cost == VIEW else "rebuilt"
                self.report.add(self.context.name, label, operand, how, 0, known)
            return known
        reason = why_uncompressed(tensor, rule)
        if operator in _AUTOCAST and (reason or rule.lossless):
            dtype = _autocast(tensor)
            if dtype is not None:
                return self._keep_cast(tensor, dtype, operator, operand, within, label)
        if reason:
            self.report.add(
                self.context.name, label, operand, f"uncompressed: {reason}", new_bytes(tensor)
            )
            if rule.enabled and holds_more_than_itself(tensor, rule.min_bytes):
                copy = uncompressed(tensor.detach().clone())
                self.lineage.set(tensor, copy)
                return copy
            cast = operator in _AUTOCAST and autocasts(tensor.device.type)
            return uncompressed(held(tensor) if cast else tensor)
        if rule.lossless and not rule.offload and saved_with_its_base(tensor):
            self.report.add(self.context.name, label, operand, "shared", 0)
            leaf = uncompressed(tensor)
            self.lineage.set(tensor, leaf)
            return leaf
        codec = self.codec(operator, operand)
        dims = tuple([d % tensor.dim() for d in within])
        # Detached, so that autograd records nothing of this.
        layout, matrix = MatrixLayout.of(tensor.detach(), dims)
        codes = codec.encode(matrix)
        leaf = self.leaf(codec, codes, layout, tensor.dtype, operator, operand, label)
        self.lineage.set(tensor, leaf)
        return leaf

    def weight(self, tensor: Tensor, viewed: bool = False) -> Stash:
        """The stash of a weight or bias, as PyTorch saves it.

        - If the model computed the tensor: autocast's cast of it.
        - If the tensor is a parameter that is cast or `viewed`: its data. A Linear views its weight: it saves the
          transpose. PyTorch saves a cast of a frozen weight; the data exists anyway.
        - Otherwise: the parameter itself.
        """
        dtype = None if frozen(tensor) else _autocast(tensor)
        if dtype is None:
            return uncompressed(held(tensor) if viewed or autocasts(tensor.device.type) else tensor)
        stash = self.lineage.cast(tensor, dtype)
        if stash is None:
            with torch.no_grad():
                stash = uncompressed(tensor.to(dtype))
            self.lineage.set_cast(tensor, dtype, stash)
        return stash

    def parameters(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Weight and bias for a recipe that recomputes an output."""
        return tuple([self.weight(t, viewed=True).tensors[0] for t in tensors if t is not None])

    def _keep_cast(
        self,
        tensor: Tensor,
        dtype: torch.dtype,
        operator: str,
        operand: str,
        within: tuple[int, ...],
        label: str,
    ) -> Stash:
        """`keep` of an uncompressed operand in the dtype that autocast computes in.

        PyTorch saves this cast too. The operand itself may be twice as large.
        """
        stash = self.lineage.cast(tensor, dtype)
        if stash is not None:
            self.report.add(self.context.name, label, operand, "shared", 0, stash)
            return stash
        with torch.no_grad():
            narrow = tensor.to(dtype)
        stash = self.keep(narrow, operator, operand, within, label)
        self.lineage.set_cast(tensor, dtype, stash)
        return stash

    def known(self, tensor: Tensor, operator: str, operand: str) -> Stash | None:
        """The stash that `tensor` has already if `operand` may be rebuilt from it, else None."""
        known = self.lineage.get(tensor)
        if known is None:
            return None
        rule = self.context.rules.table[operator, operand]
        return known if rule.enabled and known.cost <= rule.limit else None

    def fused(
        self, operator: str, operand: str, dtype: torch.dtype, tensor: Tensor | None = None
    ) -> Affine | None:
        """The codec of a fused forward, or None if PyTorch's own function is to be called.

        A fused forward makes the codes of `operand` in the pass that computes its output, in float32. If `tensor`,
        the tensor to be coded, is given, it must be worth coding.
        """
        rule = self.context.rules[operator, operand]
        if not rule.fused or dtype is torch.float64:
            return None
        return self._affine(rule, tensor)

    def new_codes(self, tensor: Tensor, operator: str, operand: str) -> Affine | None:
        """The codec if `keep` would make new affine codes of `tensor`, else None."""
        if self.known(tensor, operator, operand) is not None:
            return None
        return self._affine(self.context.rules[operator, operand], tensor)

    def _affine(self, rule: Rule, tensor: Tensor | None) -> Affine | None:
        """The rule's codec if it is affine and `tensor` would be coded with it, else None."""
        if not isinstance(rule.codec, Affine) or self.discards() or selective():
            return None
        return None if tensor is not None and why_uncompressed(tensor, rule) else rule.codec

    def codec(self, operator: str, operand: str) -> Any:
        """The codec for the next use of an operand in this module."""
        rule = self.context.rules[operator, operand]
        return self.in_checkpoint(rule.codec or self._running(operator, operand, rule.group_size))

    def in_checkpoint(self, codec: Any) -> Any:
        """`codec`, as the passes of a checkpoint need it (see `codecs/placeholder.py`)."""
        if self.discards():
            return PlaceholderCodec(codec)
        return SACHiddenCodec(codec) if selective() else codec

    def lossless(self, operator: str, operand: str) -> bool:
        """True if an operand stays uncompressed."""
        return self.context.rules.table[operator, operand].lossless

    def bits(self, mask: Tensor, encode: Callable[[Tensor], Tensor] = bitmask.encode) -> Tensor:
        """A mask as one bit per element, coded by `encode`."""
        if self.discards():
            return bits(mask)
        with unseen() if selective() else contextlib.nullcontext():
            return encode(mask)

    def discards(self) -> bool:
        """True if the stashes saved now are thrown away. True in the first pass of a checkpoint."""
        return self.hooks is not None and discards(beneath(self.hooks))

    def leaf(
        self,
        codec: Any,
        tensors: tuple[Tensor, ...],
        layout: MatrixLayout,
        dtype: torch.dtype,
        operator: str,
        operand: str,
        label: str = "",
    ) -> Stash:
        """A leaf of codes that exist already, reported. `label`: as for `keep`."""
        if isinstance(codec, PlaceholderCodec):
            return Stash(Leaf(codec.codec, layout), tensors, cost=VIEW, dtype=dtype)
        codec = codec.codec if isinstance(codec, SACHiddenCodec) else codec
        offloaded = None
        if self.context.rules[operator, operand].offload:
            tensors, offloaded = self._offloaded(tensors, own=not isinstance(codec, Lossless))
        stash = Stash(Leaf(codec, layout), tensors, cost=VIEW, dtype=dtype, offloaded=offloaded)
        if not self.traced:
            size = sum([t.nbytes for t in tensors])
            how = str(codec) if offloaded is None else f"{codec}, offloaded"
            self.report.add(self.context.name, label or operator, operand, how, size, stash)
        return stash

    def _offloaded(
        self, tensors: tuple[Tensor, ...], own: bool
    ) -> tuple[tuple[Tensor, ...], OffloadedStash | None]:
        """Copy a leaf's tensors to CPU memory if they may be offloaded. `own`: no other object holds them."""
        # Within a backward, a checkpoint's recompute uses its saved tensors at once.
        offload_stream = offload_stream_of(tensors[0].device)
        if offload_stream is None or torch._C._current_graph_task_id() != -1:
            return tensors, None
        if not passes(beneath(self.hooks)):
            return tensors, None
        if not own:
            # The caller may write to the tensor before the copy is complete.
            with torch.no_grad():
                tensors = tuple([t.clone(memory_format=torch.contiguous_format) for t in tensors])
        if self.order and self.order[-1]() is None:
            # The forward of the last leaf is over. Under `compress` one list would grow with every step.
            self.order = []
        return offload_stream.send(tensors, self.order)

    def _running(self, operator: str, operand: str, group_size: int) -> Running:
        """The running-ranges codec of an operand's next use in this module's forward."""
        context = self.context
        key = (context.name, operator, operand)
        use = self.uses.get(key, 0)
        self.uses[key] = use + 1
        ranges = None if context.module is None else context.ranges
        return Running(ranges, f"{operator}.{operand}.{use}", self.step, group_size)


def saved_hooks() -> Any:
    """The active pack hook, such as a checkpoint's or an offload's, or None.

    If a hook became active after the compression mode, torch calls between modules are left to PyTorch. A
    checkpoint's recompute would not find the mode active there either.
    """
    top = (
        None
        if torch.compiler.is_compiling()
        else torch._C._autograd._top_saved_tensors_default_hooks(False)
    )
    return None if top is None else top[0]


def beneath(pack: Any) -> Any:
    """The pack hook that `pack` calls in turn, or `pack` itself.

    A hook that calls another hook has an object with `mesa_train_outer` (see `engine/checkpoint_inputs.py`).
    """
    while True:
        owner: Any = getattr(pack, "__self__", None)
        if not hasattr(owner, "mesa_train_outer"):
            return pack
        outer = owner.mesa_train_outer
        pack = None if outer is None else outer[0]


# Operators that autocast runs in its lower precision.
_AUTOCAST = frozenset(["linear", "matmul", "conv"])


def _autocast(tensor: Tensor) -> torch.dtype | None:
    """The narrower dtype that autocast casts an operand to, else None.

    None for parameters, which are saved without a cast.
    """
    device = tensor.device.type
    if tensor.dtype is not torch.float32 or not autocasts(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    return dtype if dtype.itemsize < tensor.dtype.itemsize and not of_parameter(tensor) else None


def why_uncompressed(tensor: Tensor, rule: Rule) -> str:
    """The reason why a tensor stays uncompressed, or "" if it is to be coded."""
    if not rule.enabled:
        return "disabled"
    if parameter := of_parameter(tensor):
        return parameter
    if tensor.dtype.itemsize < 2 or not tensor.is_floating_point():
        return f"dtype {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel() * tensor.element_size() < rule.min_bytes:
        return f"under {rule.min_bytes} bytes"
    if tensor.dim() == 0 or tensor.shape[-1] == 1:
        return "one element per token"
    return ""
