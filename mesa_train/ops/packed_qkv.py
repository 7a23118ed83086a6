"""q, k and v in the output of one projection, coded in one pass.

Each operand gets a leaf of its own, with the same codes as if it were coded alone. On a CPU,
operands that share a codec are coded in one pass over their common rows, which reads memory in
order. Three separate passes would each read a third of every row and skip the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mesa_train.codecs.affine import Affine
from mesa_train.stash.recorder import Recorder
from mesa_train.stash.stash import MatrixLayout, Stash


class _New(NamedTuple):
    """An operand that needs a leaf. `place`: its index among the operands."""

    place: int
    codec: Affine
    layout: MatrixLayout
    matrix: Tensor


def keep_each(
    recorder: Recorder,
    tensors: Sequence[Tensor],
    operator: str,
    operands: Sequence[str],
    within: tuple[int, ...],
) -> list[Stash]:
    """`recorder.keep` of every tensor as the operand of that name.

    Args:
        recorder: the recorder of the call.
        tensors: the tensors to save.
        operator: the policy's name of the operator.
        operands: the policy's name of each operand.
        within: the dims that one group of codes may span.
    Returns:
        The stash of each tensor.
    """
    leaves: dict[int, Stash] = {}
    if tensors[0].device.type == "cpu" and not torch.compiler.is_compiling():
        for run in _runs(list(_new(recorder, tensors, operator, operands, within))):
            for new, codes in zip(run, _coded(run), strict=True):
                tensor, operand = tensors[new.place], operands[new.place]
                leaf = recorder.leaf(new.codec, codes, new.layout, tensor.dtype, operator, operand)
                recorder.lineage.set(tensor, leaf)
                leaves[new.place] = leaf
    return [
        leaves.get(i) or recorder.keep(tensor, operator, operand, within)
        for i, (tensor, operand) in enumerate(zip(tensors, operands, strict=True))
    ]


def _new(
    recorder: Recorder,
    tensors: Sequence[Tensor],
    operator: str,
    operands: Sequence[str],
    within: tuple[int, ...],
) -> Iterator[_New]:
    """The operands that need a leaf of affine codes."""
    for place, (tensor, operand) in enumerate(zip(tensors, operands, strict=True)):
        # A contiguous tensor has no adjacent operand within its rows.
        codec = None if tensor.is_contiguous() else recorder.new_codes(tensor, operator, operand)
        if codec is not None:
            dims = tuple([d % tensor.dim() for d in within])
            yield _New(place, codec, *MatrixLayout.of(tensor.detach(), dims))


def _runs(news: list[_New]) -> Iterator[list[_New]]:
    """Runs of two or more operands whose columns follow each other in the same rows."""
    run: list[_New] = []
    for new in news:
        if run and not _continues(run, new):
            if len(run) > 1:
                yield run
            run = []
        run.append(new)
    if len(run) > 1:
        yield run


def _continues(run: list[_New], new: _New) -> bool:
    """True if the columns of `new` follow the run's columns, with the same codec and layout."""
    first, matrix = run[0].matrix, new.matrix
    cols = first.shape[1]
    return bool(
        new.codec == run[0].codec
        and matrix.dtype is first.dtype
        and matrix.shape == first.shape
        and matrix.stride() == first.stride()
        and first.stride(1) == 1
        and first.stride(0) >= (len(run) + 1) * cols
        and matrix.storage_offset() == first.storage_offset() + len(run) * cols
        and matrix.untyped_storage()._cdata == first.untyped_storage()._cdata
    )


def _coded(run: list[_New]) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of each operand of a run, in one pass."""
    first = run[0].matrix
    rows, cols = first.shape
    with torch.no_grad():
        packed = first.as_strided((rows, len(run) * cols), first.stride(), first.storage_offset())
        return run[0].codec.encode_parts(packed, len(run))
