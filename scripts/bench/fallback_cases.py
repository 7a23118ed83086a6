"""Calls that scripts/bench/fallback.py measures: realistic sizes, and inputs that suit codes badly.

`named` yields calls written by hand: coordinates, angles, indices as floats, recurrent layers,
products of several operands. `pointwise` applies PyTorch's own element-wise and reducing functions
to large tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.opinfo.core import (
    BinaryUfuncInfo,
    OpInfo,
    ReductionOpInfo,
    UnaryUfuncInfo,
)


class Call(NamedTuple):
    """A function's call on tensors.

    Attributes:
        function: its name.
        inputs: description of the inputs.
        call: the function.
        tensors: its inputs.
    """

    function: str
    inputs: str
    call: Callable[..., Any]
    tensors: list[Tensor]


SHAPE = (128, 96)  # 48 KiB: three times the smallest size that is coded
# Distributions of the elements: usual ones of a network, and ones that suit codes badly.
DRAWN: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "normal": lambda shape: torch.randn(shape),
    "offset: 100 and standard deviation 1": lambda shape: torch.randn(shape) + 100,
    "large: standard deviation 100": lambda shape: 100 * torch.randn(shape),
    "magnitudes from 0.001 to 1000": lambda shape: (
        torch.randn(shape).sign() * 10 ** (6 * torch.rand(shape) - 3)
    ),
}


def pointwise(op: OpInfo) -> Iterator[Call]:
    """An element-wise or reducing function of torch on large tensors.

    The elements have each distribution that fits the function's domain.
    """
    if not isinstance(op, (UnaryUfuncInfo, BinaryUfuncInfo, ReductionOpInfo)):
        return
    name = full_name(op)
    for words, draw in DRAWN.items():
        if isinstance(op, UnaryUfuncInfo):
            yield Call(name, words, op.op, [_within(draw(SHAPE), *op.domain)])
        elif isinstance(op, BinaryUfuncInfo):
            yield Call(name, words, op.op, [draw(SHAPE), draw(SHAPE)])
        else:
            yield Call(name, words, lambda x, op=op: op(x, dim=-1), [draw(SHAPE)])


def full_name(op: OpInfo) -> str:
    """The name of an OpInfo and of its variant."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def _within(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Map `x` into a function's domain, away from poles and bounds."""
    if low is not None and high is not None:
        return low + (high - low) * (0.001 + 0.998 * torch.sigmoid(x))
    if low is not None:
        return low + x.abs() + 1e-3
    return x


def _smooth(*shape: int) -> Tensor:
    """Images with small differences between neighbouring pixels, as in photographs."""
    small = torch.randn(shape[0], shape[1], shape[2] // 8, shape[3] // 8)
    return F.interpolate(small, size=shape[2:], mode="bicubic")


def _grid(n: int, size: int) -> Tensor:
    """A grid for `grid_sample`, a few pixels away from the identity."""
    lines = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(lines, lines, indexing="xy"), -1).expand(n, -1, -1, -1)
    return grid + 0.05 * torch.randn(n, size, size, 2)


def _boxes(images: int, count: int) -> Tensor:
    """`count` boxes: the index of the image, and two corners in pixels."""
    corner = 40 * torch.rand(count, 2)
    index = torch.randint(images, (count, 1)).float()
    return torch.cat([index, corner, corner + 4 + 20 * torch.rand(count, 2)], -1)


def _coordinates() -> Iterator[Call]:
    """Functions of coordinates and angles."""
    for words, picture in [("noise", torch.randn(2, 8, 64, 64)), ("smooth", _smooth(2, 8, 64, 64))]:
        for mode in ("bilinear", "bicubic"):
            yield Call(
                "grid_sample",
                f"{mode}, {words}",
                lambda x, g, mode=mode: F.grid_sample(x, g, mode, align_corners=False),
                [picture, _grid(2, 64)],
            )
        yield Call(
            "grid_sample, its input alone coded",
            f"bilinear, {words}",
            lambda x, g: F.grid_sample(x, g, align_corners=False),
            [picture, _grid(2, 64)],
        )
    for bound in (10, 100, 300):
        x = bound * (2 * torch.rand(SHAPE) - 1)
        yield Call("sin", f"angles within {bound}", torch.sin, [x])
        yield Call("cos", f"angles within {bound}", torch.cos, [x])
        yield Call("tan", f"angles within {bound}", torch.tan, [x])
    yield Call("exp", "log(1 + exp(x)), standard deviation 3", _softplus, [3 * torch.randn(SHAPE)])
    yield Call("div", "x / (1 + |x|), standard deviation 30", _softsign, [30 * torch.randn(SHAPE)])
    yield Call(
        "erf",
        "GELU by hand, standard deviation 3",
        lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        [3 * torch.randn(SHAPE)],
    )
    yield Call(
        "affine_grid",
        "normal",
        lambda t: F.affine_grid(t, [1024, 1, 4, 4]),
        [torch.randn(1024, 2, 3)],
    )


def _softplus(x: Tensor) -> Tensor:
    """Softplus written with exp and log."""
    return torch.log(1 + torch.exp(x))


def _softsign(x: Tensor) -> Tensor:
    """Softsign written with a division."""
    return x / (1 + x.abs())


def _torchvision() -> Iterator[Call]:
    """torchvision's functions, if it is installed."""
    try:
        from torchvision import ops
    except ImportError:
        return
    maps, boxes = torch.randn(2, 8, 64, 64), _boxes(2, 1000)
    wide = torch.randn(2, 32, 64, 64)
    for name, function in [
        ("roi_align", lambda x, b: ops.roi_align(x, b, 2)),
        ("roi_pool", lambda x, b: ops.roi_pool(x, b, 2)),
    ]:
        yield Call(name, "1,000 boxes on two images", function, [maps, boxes])
    for name, function in [
        ("ps_roi_align", lambda x, b: ops.ps_roi_align(x, b, 2)),
        ("ps_roi_pool", lambda x, b: ops.ps_roi_pool(x, b, 2)),
    ]:
        yield Call(name, "1,000 boxes on two images", function, [wide, boxes])
    offsets, weight = torch.randn(2, 18, 64, 64), torch.randn(8, 8, 3, 3)
    yield Call(
        "deform_conv2d",
        "offsets of a pixel",
        lambda x, o, w: ops.deform_conv2d(x, o, w, padding=1),
        [maps, offsets, weight],
    )
    yield Call(
        "sigmoid_focal_loss",
        "normal",
        lambda x, t: ops.sigmoid_focal_loss(x, t, reduction="sum"),
        [torch.randn(SHAPE), (torch.rand(SHAPE) > 0.5).float()],
    )
    yield Call(
        "stochastic_depth",
        "normal",
        lambda x: ops.stochastic_depth(x, 0.5, "row"),
        [torch.randn(SHAPE)],
    )
    corner = 100 * torch.rand(1000, 2)
    near = torch.cat([corner, corner + 10 + 20 * torch.rand(1000, 2)], -1)
    for name in ("generalized_box_iou_loss", "complete_box_iou_loss", "distance_box_iou_loss"):
        loss = getattr(ops, name)
        yield Call(
            name,
            "boxes in pixels",
            lambda a, b, loss=loss: loss(a, b, reduction="sum"),
            [near, near + torch.randn(1000, 4)],
        )


def _products(words: str, draw: Callable[[tuple[int, ...]], Tensor]) -> Iterator[Call]:
    """Functions that are linear in each operand."""
    square = (96, 96)
    calls: list[tuple[Any, ...]] = [
        ("mul", torch.mul, SHAPE, SHAPE),
        ("conv_transpose1d", F.conv_transpose1d, (4, 16, 96), (16, 8, 3)),
        ("conv_transpose2d", F.conv_transpose2d, (2, 8, 32, 32), (8, 4, 3, 3)),
        ("conv_transpose3d", F.conv_transpose3d, (1, 8, 8, 16, 16), (8, 4, 3, 3, 3)),
        ("conv_tbc", torch.conv_tbc, (64, 8, 16), (3, 16, 8), (8,)),
        ("conv1d", F.conv1d, (16, 96), (8, 16, 3)),
        ("conv2d", F.conv2d, (8, 32, 32), (4, 8, 3, 3)),
        ("conv3d", F.conv3d, (8, 8, 16, 16), (4, 8, 3, 3, 3)),
        ("mv", torch.mv, SHAPE, SHAPE[1:]),
        ("matmul", torch.matmul, (4, *SHAPE), SHAPE[1:]),
        ("addmv", torch.addmv, SHAPE[:1], SHAPE, SHAPE[1:]),
        ("addbmm", torch.addbmm, square, (4, *square), (4, *square)),
        ("addr", torch.addr, SHAPE, SHAPE[:1], SHAPE[1:]),
        ("dot", torch.dot, (9216,), (9216,)),
        ("vdot", torch.vdot, (9216,), (9216,)),
        ("inner", torch.inner, SHAPE, SHAPE),
        ("outer", torch.outer, (9216,), (8,)),
        ("ger", torch.ger, (9216,), (8,)),
        ("tensordot", lambda a, b: torch.tensordot(a, b, 1), SHAPE, square),
        ("einsum", lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c), SHAPE, square, square),
        ("bilinear", F.bilinear, SHAPE, (128, 64), (8, 96, 64)),
        ("chain_matmul", torch.chain_matmul, SHAPE, square, square),
        ("linalg_multi_dot", lambda *a: torch.linalg.multi_dot(a), SHAPE, square, square),
        ("kron", torch.kron, SHAPE, (4, 4)),
        ("cross", lambda a, b: torch.cross(a, b, dim=-1), (4096, 3), (4096, 3)),
        ("linalg_cross", torch.linalg.cross, (4096, 3), (4096, 3)),
        ("lerp", torch.lerp, SHAPE, SHAPE, SHAPE),
        ("addcmul", torch.addcmul, SHAPE, SHAPE, SHAPE),
        ("addcdiv", torch.addcdiv, SHAPE, SHAPE, SHAPE),
        ("div", torch.div, SHAPE, SHAPE),
        ("linear", F.linear, SHAPE, SHAPE[1:]),
        ("square", torch.square, SHAPE),
        ("pow, exponent 2", lambda x: x**2, SHAPE),
        ("pow, exponent 3", lambda x: x**3, SHAPE),
        ("pow, exponent 0.5", lambda x: x.abs() ** 0.5, SHAPE),
        ("pow, exponent -1", lambda x: (x.abs() + 0.01) ** -1, SHAPE),
        ("var", lambda x: x.var(-1), SHAPE),
        ("std", lambda x: x.std(-1), SHAPE),
        ("cosine_similarity", F.cosine_similarity, SHAPE, SHAPE),
        ("instance_norm", F.instance_norm, (2, 8, 32, 32)),
        ("local_response_norm", lambda x: F.local_response_norm(x, 5), (2, 8, 32, 32)),
        ("lp_pool2d", lambda x: F.lp_pool2d(x, 3, 2), (2, 8, 32, 32)),
    ]
    for name, call, *shapes in calls:
        yield Call(name, words, call, [draw(s) for s in shapes])


def _recurrent(words: str, draw: Callable[[tuple[int, ...]], Tensor]) -> Iterator[Call]:
    """Recurrent layers."""
    for name, kind in [("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU), ("rnn_tanh", torch.nn.RNN)]:
        layer = kind(96, 64, bidirectional=True)
        weights = list(layer.parameters())
        yield Call(
            name, words, lambda x, *_, layer=layer: layer(x)[0], [draw((16, 32, 96)), *weights]
        )


def _sizes() -> Iterator[Call]:
    """Pooling, padding, indexing and Fourier functions."""
    x, index = torch.randn(2, 8, 32, 32), torch.randint(32, (2, 8, 32, 32))
    for name, call in [
        ("max_pool1d", lambda x: F.max_pool1d(x.flatten(2), 2)),
        ("max_pool2d", lambda x: F.max_pool2d(x, 3, 2, 1)),
        ("max_pool3d", lambda x: F.max_pool3d(x, 2)),
        ("avg_pool1d", lambda x: F.avg_pool1d(x.flatten(2), 2)),
        ("avg_pool2d", lambda x: F.avg_pool2d(x, 3, 2, 1)),
        ("avg_pool3d", lambda x: F.avg_pool3d(x, 2)),
        ("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x.flatten(2), 7)),
        ("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 7)),
        ("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 3)),
        ("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x.flatten(2), 7)),
        ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, 7)),
        ("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 3)),
        ("fractional_max_pool2d", lambda x: F.fractional_max_pool2d(x, 2, 9)),
        ("fractional_max_pool3d", lambda x: F.fractional_max_pool3d(x, 2, 4)),
        ("pad", lambda x: F.pad(x, (2, 1, 1, 2), mode="reflect")),
        ("pad", lambda x: F.pad(x, (2, 1, 1, 2), mode="replicate")),
        ("interpolate", lambda x: F.interpolate(x, size=(9, 9), mode="area")),
        ("gather", lambda x: x.gather(-1, index)),
        ("take", lambda x: x.take(index)),
        ("take_along_dim", lambda x: x.take_along_dim(index, -1)),
        ("masked_select", lambda x: x.masked_select(index > 9)),
        ("fft", lambda x: torch.fft.fft(x).abs()),
        ("rfft", lambda x: torch.fft.rfft(x).abs()),
        ("rfft2", lambda x: torch.fft.rfft2(x).abs()),
        ("rfftn", lambda x: torch.fft.rfftn(x).abs()),
    ]:
        yield Call(name, "normal", call, [x])


def named() -> Iterator[Call]:
    """The calls written by hand."""
    yield from _coordinates()
    yield from _torchvision()
    for words, draw in DRAWN.items():
        yield from _products(words, draw)
        yield from _recurrent(words, draw)
    yield from _sizes()
