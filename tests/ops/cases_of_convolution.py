"""Cases of convolutions, plain and deformable."""

import torch
import torch.nn.functional as F
from operator_case import Case, activation, constant, of_module, parameter
from torch import nn
from torchvision.ops import deform_conv2d


def deform_conv(x, offset, weight, bias=None, mask=None, stride=2, padding=0):
    """torchvision's, which has no kernel for bfloat16 on a CPU."""
    wide = torch.promote_types(x.dtype, torch.float32)
    tensors = [None if t is None else t.to(wide) for t in (x, offset, weight, bias, mask)]
    *tensors, mask = tensors
    return deform_conv2d(*tensors, stride=stride, padding=padding, mask=mask).to(x.dtype)


def _conv():
    for dims in (1, 2, 3):
        conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        size = (7, 6, 5)[:dims]
        inputs = (activation(2, 4, *size), parameter(6, 4, *[3] * dims), parameter(6))
        yield Case(f"conv{dims}d", conv, inputs)
        yield Case(
            f"conv{dims}d stride dilation padding",
            lambda x, w, b, c=conv: c(x, w, b, stride=2, padding=2, dilation=2),
            inputs,
        )
        yield Case(f"conv{dims}d same", lambda x, w, b, c=conv: c(x, w, b, padding="same"), inputs)
        yield Case(
            f"conv{dims}d depthwise",
            lambda x, w, c=conv: c(x, w, groups=4, padding=1),
            (activation(2, 4, *size), parameter(4, 1, *[3] * dims)),
        )
    x = activation(2, 4, 7, 6)
    yield Case(
        "conv2d grouped",
        lambda x, w, b: F.conv2d(x, w, b, groups=2),
        (x, parameter(6, 2, 3, 3), parameter(6)),
    )
    yield Case(
        "conv2d valid", lambda x, w: F.conv2d(x, w, padding="valid"), (x, parameter(6, 4, 3, 2))
    )
    yield Case(
        "conv2d same, even kernel",
        lambda x, w: F.conv2d(x, w, padding="same"),
        (x, parameter(6, 4, 2, 4)),
        fallback=True,
    )
    yield Case(
        "conv2d of tuples",
        lambda x, w: F.conv2d(x, w, None, (2, 1), (0, 1), (1, 2), 1),
        (x, parameter(6, 4, 3, 2)),
    )
    yield Case("conv2d of a constant", F.conv2d, (constant(2, 4, 7, 6), parameter(6, 4, 3, 3)))
    yield Case("conv2d frozen", F.conv2d, (x, constant(6, 4, 3, 3)))
    for name, offset_role in (("", activation), (" by constant offsets", constant)):
        yield Case(
            f"deform_conv2d{name}",
            deform_conv,
            (x, offset_role(2, 8, 3, 3), parameter(6, 4, 2, 2), parameter(6)),
        )
    yield Case(
        "deform_conv2d with a mask",
        lambda x, o, w, m: deform_conv(x, o, w, None, m, stride=1, padding=1),
        (x, activation(2, 8, 8, 7), parameter(6, 4, 2, 2), activation(2, 4, 8, 7)),
    )
    yield Case(
        "deform_conv2d and conv2d",
        lambda x, w, v: deform_conv(x, F.conv2d(x, v, stride=2), w),
        (x, parameter(6, 4, 2, 2), parameter(8, 4, 2, 2)),
    )
    yield Case(
        "conv2d unbatched", F.conv2d, (activation(4, 7, 6), parameter(6, 4, 3, 3)), fallback=True
    )
    yield Case("conv_transpose2d", F.conv_transpose2d, (x, parameter(4, 6, 3, 3)))
    yield Case(
        "conv_transpose2d grouped",
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 1), 1, (1, 0), 2, 2),
        (x, parameter(4, 3, 3, 3), parameter(6)),
    )
    yield Case(
        "conv_transpose3d behind a norm",
        lambda x, w: F.conv_transpose3d(F.instance_norm(x), w, stride=2),
        (activation(2, 4, 3, 2, 3), parameter(4, 5, 2, 2, 2)),
    )
    for mode in ("reflect", "circular", "replicate", "zeros"):
        yield of_module(
            f"nn.Conv2d padding_mode={mode}",
            lambda mode=mode: nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode),
            activation(2, 4, 7, 6),
        )


CONVOLUTION = [*_conv()]
