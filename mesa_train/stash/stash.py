"""Stashes: the saved form of tensors for the backward.

A `Stash` is a recipe with the tensors and the source stashes that the recipe reads. The recipe of a leaf decodes
codes. The recipe of a derived stash applies a cheap deterministic function to its sources: a norm's affine part, an
activation, a view, a cast. A leaf is made once per tensor, and all operators that need the tensor share it. For
example, a norm's own backward reads its x_hat. The weight gradient of the Linear behind reads the same x_hat
through a derived stash.

An operator saves stashes with `save`. Every tensor goes through `ctx.save_for_backward`, so that saved-tensor
hooks, checkpointing and offloading apply to it. Only the structure without tensors (`Spec`) stays on ctx.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mesa_train.codecs.lossless import Lossless
from mesa_train.policy import MATMUL, VIEW

from .backward_cache import UseCount, UseHandle, backward_cache
from .offload import OffloadedStash, Reader
from .sharded_parameters import gather_if_partitioned, partitioned


class Codec(Protocol):
    """Turns a (rows, cols) matrix into a few small tensors, and back."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]: ...

    def decode(
        self,
        tensors: Sequence[Tensor],
        cols: int,
        dtype: torch.dtype,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor: ...


class Recipe(Protocol):
    """How to rebuild a tensor. Holds no tensor: `load` reads the saved tensors and sources of `spec` through
    `saved`.

    The tensor in another dtype is a cast of the forward's tensor. So a recipe that computes first rounds to the
    dtype of the forward (`spec.dtype`). A later cast may show this rounding, or an overflow.
    """

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor: ...


def once(own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The dtype to which a recipe that computes in float32 rounds a tensor of dtype `own`, requested in `dtype`.

    It is `dtype`, unless `own` is narrow and needs its own rounding.
    """
    return dtype if own.itemsize >= 4 and dtype.itemsize <= own.itemsize else own


class Stash:
    """A recipe with the tensors and stashes (sources) that it reads.

    Attributes:
        cost: the highest cost class of the steps that rebuild the tensor (`policy.VIEW`, `CHEAP`, `MATMUL`).
        dtype: the tensor's own dtype.
        offloaded: copies the tensors back from CPU memory; None if they were not offloaded.
    """

    __slots__ = ("cost", "dtype", "offloaded", "recipe", "sources", "tensors", "uses")
    cost: int

    def __init__(
        self,
        recipe: Recipe,
        tensors: tuple[Tensor, ...],
        sources: tuple[Stash, ...] = (),
        *,
        cost: int,
        dtype: torch.dtype,
        offloaded: OffloadedStash | None = None,
    ) -> None:
        self.recipe, self.tensors, self.sources, self.dtype = recipe, tensors, sources, dtype
        self.offloaded = offloaded
        for source in sources:
            if source.cost > cost:
                cost = source.cost
        self.cost = cost
        # The readers of a matmul's result in one backward share it. This counts these readers.
        self.uses = UseCount(_counted(sources)) if cost == MATMUL else None

    def exact(self) -> bool:
        """True if the stash contains no lossy codes."""
        return exact(self)


def _counted(sources: tuple[Stash, ...]) -> tuple[UseCount, ...]:
    """The use counts of those stashes that have one."""
    return tuple([source.uses for source in sources if source.uses is not None])


class Spec:
    """The structure of a stash, without its tensors.

    Attributes:
        slots: indices into the saved tensors.
        uses: the stash's use count, or None.
        user: the operator's entry in the use count if the operator itself reads the stash, else None.
        partitioned: ZeRO-3 parameters among the tensors, else None. They may be freed when they are read.
        reader: reads the offloaded tensors; None if they were not offloaded.
    """

    __slots__ = ("dtype", "partitioned", "reader", "recipe", "slots", "sources", "user", "uses")

    def __init__(
        self,
        recipe: Recipe,
        slots: tuple[int, ...],
        sources: tuple[Spec, ...],
        dtype: torch.dtype,
        uses: UseCount | None,
        partitioned: tuple[Any, ...] = (),
        reader: Reader | None = None,
    ) -> None:
        self.recipe, self.slots, self.sources, self.dtype = recipe, slots, sources, dtype
        self.uses, self.partitioned, self.reader = uses, partitioned, reader
        self.user: UseHandle | None = None


def exact(stash: Stash | Spec) -> bool:
    """True if a stash or its structure has no lossy codes. Then it equals the tensor up to rounding."""
    recipe = stash.recipe
    coded = isinstance(recipe, Leaf) and not isinstance(recipe.codec, Lossless)
    return not coded and all([exact(source) for source in stash.sources])


def save(ctx: Any, *stashes: Stash | None) -> None:
    """Save stashes on an autograd context, shared parts once. `Saved(ctx.saved_tensors, ctx.kept)` reads them."""
    tensors: list[Tensor] = []
    slots: dict[int, int] = {}
    specs: dict[int, Spec] = {}
    ctx.kept = tuple([None if s is None else strip(s, tensors, slots, specs) for s in stashes])
    ctx.save_for_backward(*tensors)


def strip(
    stash: Stash, tensors: list[Tensor], slots: dict[int, int], specs: dict[int, Spec]
) -> Spec:
    """The structure of a stash that an operator reads. Appends its tensors to `tensors`, each tensor once.

    `slots` and `specs` hold the indices of saved tensors and the structures made so far, by id.
    """
    spec = _strip(stash, tensors, slots, specs)
    if spec.uses is not None and spec.user is None:
        spec.user = UseHandle(spec.uses)
    return spec


def _strip(
    stash: Stash, tensors: list[Tensor], slots: dict[int, int], specs: dict[int, Spec]
) -> Spec:
    """The structure of a stash or of a source."""
    known = specs.get(id(stash))
    if known is not None:
        return known
    sources: tuple[Spec, ...] = ()
    if stash.sources:
        sources = tuple([_strip(s, tensors, slots, specs) for s in stash.sources])
    away = partitioned(stash.tensors) if stash.tensors else ()
    if torch.compiler.is_compiling():
        # A compiled graph stores a tensor once, even if it is saved several times.
        first = len(tensors)
        tensors.extend(stash.tensors)
        spec = Spec(
            stash.recipe, tuple(range(first, len(tensors))), sources, stash.dtype, None, away
        )
        specs[id(stash)] = spec
        return spec
    own = []
    for tensor in stash.tensors:
        slot = slots.get(id(tensor))
        if slot is None:
            slot = slots[id(tensor)] = len(tensors)
            tensors.append(tensor)
        own.append(slot)
    reader = None if stash.offloaded is None else Reader(stash.offloaded)
    spec = Spec(stash.recipe, tuple(own), sources, stash.dtype, stash.uses, away, reader)
    specs[id(stash)] = spec
    return spec


def value(spec: Spec, tensors: Sequence[Tensor]) -> Tensor:
    """Rebuild one tensor from its structure and the tensors that `strip` listed."""
    return Saved(tensors, (spec,))[0]


class Saved:
    """The saved stashes of an operator, in its backward.

    `saved[i]` rebuilds stash i, and `saved.get(i, dtype)` rebuilds it in another dtype. `grad` is the incoming
    gradient.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        specs: tuple[Spec | None, ...],
        grad: Tensor | None = None,
    ) -> None:
        self.tensors, self.specs, self.grad = tensors, specs, grad
        self._memo: dict[tuple[int, torch.dtype], Tensor] = {}
        self._fetched: dict[int, list[Tensor]] = {}

    def __getitem__(self, index: int) -> Tensor:
        return self.get(index)

    def get(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Stash `index` as a tensor of `dtype` (default: the tensor's own dtype)."""
        spec = self.specs[index]
        assert spec is not None, "asked for a stash that was not kept"
        if spec.uses is None:
            return self.value(spec, dtype)
        key = (id(spec), dtype or spec.dtype)
        value = self._memo.get(key)
        if value is None:
            value = self._memo[key] = self.value(spec, dtype)
        return value

    def value(self, spec: Spec, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of one structure, for one of its readers.

        It is rebuilt once per backward of an operator. If it costs a matmul, it is rebuilt once per run of the
        autograd engine, and held until its last reader has read it.
        """
        dtype = dtype or spec.dtype
        uses = spec.uses
        if uses is None:
            key = (id(spec), dtype)
            value = self._memo.get(key)
            if value is None:
                value = self._memo[key] = spec.recipe.load(self, spec, dtype)
            return value
        if uses.count <= 1:
            return spec.recipe.load(self, spec, dtype)
        value = backward_cache.take(uses, dtype)
        if value is None:
            value = spec.recipe.load(self, spec, dtype)
            backward_cache.offer(uses, dtype, value)
        else:
            self._skip(spec)
        return value

    def _skip(self, spec: Spec) -> None:
        """Count this operator's offloaded leaves beneath a shared tensor as read."""
        for source in spec.sources:
            if source.reader is not None and id(source) not in self._fetched:
                self._fetched[id(source)] = []
                source.reader.offloaded.offload_stream.skip(source.reader.offloaded)
            self._skip(source)

    def own(self, spec: Spec) -> list[Tensor]:
        """The saved tensors that the structure's recipe itself reads."""
        tensors = [self.tensors[slot] for slot in spec.slots]
        if spec.reader is not None:
            if not self._fetched.get(id(spec)):
                offloaded = spec.reader.offloaded
                self._fetched[id(spec)] = list(offloaded.offload_stream.fetch(offloaded, tensors))
            return self._fetched[id(spec)]
        if not spec.partitioned:
            return tensors
        return [
            tensor if parameter is None else gather_if_partitioned(tensor, parameter)
            for tensor, parameter in zip(tensors, spec.partitioned, strict=True)
        ]


class MatrixLayout:
    """The layout of a tensor as a (rows, cols) matrix without a copy.

    With the layout, the decoded matrix gets the memory order of the original tensor. `order` lists the tensor's
    dims from the slowest to the fastest in memory. The last of these dims, as far as they are among `within`, form
    the columns. Groups of codes lie within a row, so they never cross the other dims.
    """

    __slots__ = ("cols", "order", "shape")

    def __init__(self, shape: tuple[int, ...], order: tuple[int, ...], cols: int) -> None:
        self.shape, self.order, self.cols = shape, order, cols

    @classmethod
    def of(cls, x: Tensor, within: tuple[int, ...]) -> tuple[MatrixLayout, Tensor]:
        """The layout of `x`, and `x` as a (rows, cols) matrix: a view if the strides allow it."""
        dims = x.dim()
        if dims == 0:
            return cls((), (), 1), x.reshape(1, 1)
        order = tuple(range(dims))
        if not x.is_contiguous():
            strides = x.stride()
            if 0 in strides:
                x = x.contiguous()
            else:
                order = _descending(strides)
        inner = 0
        while inner < dims and order[dims - 1 - inner] in within:
            inner += 1
        inner = max(inner, 1)
        permuted = x.permute(order)
        rows, cols = 1, 1
        for size in permuted.shape[: dims - inner]:
            rows *= size
        for size in permuted.shape[dims - inner :]:
            cols *= size
        return cls(tuple(x.shape), order, cols), permuted.reshape(rows, cols)

    def restore(self, matrix: Tensor) -> Tensor:
        """A decoded (rows, cols) matrix as a tensor of the original shape and memory order."""
        if not self.shape:
            return matrix.reshape(())
        inverse = [0] * len(self.order)
        for position, dim in enumerate(self.order):
            inverse[dim] = position
        return matrix.reshape([self.shape[d] for d in self.order]).permute(inverse)


def _descending(strides: tuple[int, ...]) -> tuple[int, ...]:
    """The dims by falling stride. Sorted by comparisons, because Dynamo sorts only constants."""
    order: list[int] = []
    for dim in range(len(strides)):
        place = len(order)
        while place > 0 and strides[order[place - 1]] < strides[dim]:
            place -= 1
        order.insert(place, dim)
    return tuple(order)


class Leaf:
    """Recipe: decode codes."""

    __slots__ = ("codec", "layout")

    def __init__(self, codec: Codec, layout: MatrixLayout) -> None:
        self.codec, self.layout = codec, layout

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        return self.layout.restore(self.codec.decode(saved.own(spec), self.layout.cols, dtype))


class Uncompressed:
    """Recipe: the tensor itself. For weights, statistics, and tensors that are too small to code."""

    def load(self, saved: Saved, spec: Spec, dtype: torch.dtype) -> Tensor:
        tensor, grad = saved.own(spec)[0], saved.grad
        if (
            torch.compiler.is_compiling()
            and grad is not None
            and grad.dtype is dtype
            and tensor.dtype is not dtype
        ):
            # The partitioner would find autocast's cast of the weight in the forward, and save this copy. A cast
            # that depends on the gradient cannot run before the backward.
            return torch.ops.mesa_train.cast_like(tensor, grad)
        return tensor.to(dtype)


WHOLE = Uncompressed()


def uncompressed(tensor: Tensor) -> Stash:
    """Save a tensor uncompressed. A Parameter stays a Parameter, because sharded training frees and gathers it."""
    if tensor.requires_grad and not isinstance(tensor, torch.nn.Parameter):
        tensor = tensor.detach()
    return Stash(WHOLE, (tensor,), cost=VIEW, dtype=tensor.dtype)
