"""The forward is PyTorch's bit for bit, whatever the strides, the autocast and the gradients that are asked for."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch
from torch.utils._python_dispatch import TorchDispatchMode

from mesa_train import Policy, compress

POLICY = Policy(min_bytes=0)
brain = torch.bfloat16


class Names(TorchDispatchMode):
    """Which operators of ATen multiply matrices."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.name() or "linear" in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def rows(layout):
    """(2, 32, 24) in a layout."""
    return {
        "contiguous": lambda: torch.randn(2, 32, 24),
        "transposed": lambda: torch.randn(2, 24, 32).transpose(1, 2),
        "every other": lambda: torch.randn(2, 32, 48)[..., ::2],
        "without the first": lambda: torch.randn(2, 33, 24)[:, 1:],
        "expanded": lambda: torch.randn(1, 32, 24).expand(2, 32, 24),
        "batch inside": lambda: torch.randn(32, 2, 24).transpose(0, 1),
        "heads": lambda: torch.randn(2, 4, 24, 8).permute(0, 1, 3, 2),
    }[layout]()


LAYOUTS = [
    "contiguous",
    "transposed",
    "every other",
    "without the first",
    "expanded",
    "batch inside",
    "heads",
]
PRODUCTS = {
    "linear": lambda x, w, b: F.linear(x, w),
    "linear with bias": F.linear,
    "matmul": lambda x, w, b: x @ w.t(),
    "matmul of a leaf": lambda x, w, b: x.mT.contiguous().mT @ w.mT,
    "matrix first": lambda x, w, b: w @ x.mT,
    "bmm": lambda x, w, b: torch.bmm(x.flatten(0, -3), w.t().expand(x[..., 0, 0].numel(), -1, -1)),
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, -3)[0], w.t()),
    "baddbmm": lambda x, w, b: torch.baddbmm(
        b, x.flatten(0, -3), w.t().expand(x[..., 0, 0].numel(), -1, -1)
    ),
    "einsum": lambda x, w, b: torch.einsum("bnc,oc->bno", x.flatten(0, -3), w),
}


def both(function, *leaves, autocast=False):
    """(output, ATen's products) in plain PyTorch and under the policy; one memory for both."""
    results = []
    for policy in (None, POLICY):
        seed_torch(1)
        under = contextlib.nullcontext() if policy is None else compress(policy)
        with torch.autocast("cpu", brain, enabled=autocast), under, Names() as seen:
            output = function(*leaves)
        results.append((output, seen.names))
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, layout):
    for x_grad, w_grad, autocast, dtype in itertools.product(
        (False, True), (False, True), (False, True), (torch.float32, brain)
    ):
        if not (x_grad or w_grad):
            continue
        seed_torch(0)
        x = rows(layout).to(dtype).detach().requires_grad_(x_grad)
        w = torch.randn(40, 24, dtype=dtype).requires_grad_(w_grad)
        b = torch.randn(40, dtype=dtype).requires_grad_(w_grad)
        what = f"x {x_grad}, w {w_grad}, autocast {autocast}, {dtype}"
        (expected, plain), (found, ours) = both(PRODUCTS[name], x, w, b, autocast=autocast)
        assert torch.equal(found, expected), what
        assert found.stride() == expected.stride(), what
        assert ours == plain, what


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_of_a_transposed_image_under_autocast(bias):
    """As SegFormer and AIMv2 have it: (B, C, H * W) to (B, H * W, C); large enough for two sums to differ."""
    x = torch.randn(2, 96, 256).transpose(1, 2).detach().requires_grad_()
    layer = torch.nn.Linear(96, 128, bias=bias)
    (expected, plain), (found, ours) = both(layer, x, autocast=True)
    assert torch.equal(found, expected)
    assert ours == plain


def test_nothing_is_saved_for_the_product_that_is_recorded_and_dropped():
    x = torch.randn(2, 24, 32, requires_grad=True).mul(1.0).transpose(1, 2)
    w = torch.randn(40, 24, requires_grad=True)
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        compress(POLICY),
    ):
        F.linear(x, w)
    # Codes, scales and the weight.
    assert len(saved) == 3


OTHERS = {
    "conv2d": lambda x, w: F.conv2d(x, w, padding=1),
    "conv2d, depthwise": lambda x, w: F.conv2d(x, w[:8, :1], groups=8),
    "conv2d and batch_norm": lambda x, w: F.batch_norm(F.conv2d(x, w), None, None, training=True),
    "batch_norm": lambda x, w: F.batch_norm(x, None, None, training=True),
    "group_norm": lambda x, w: F.group_norm(x, 2),
    "layer_norm": lambda x, w: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x, w: F.rms_norm(x, x.shape[-1:]),
    "softmax": lambda x, w: x.softmax(-1),
    "softmax of channels": lambda x, w: x.softmax(1),
    "normalize": lambda x, w: F.normalize(x, dim=1),
    "gelu": lambda x, w: F.gelu(x),
    "hardswish": lambda x, w: F.hardswish(x),
    "glu": lambda x, w: F.glu(x, 1),
    "dropout": lambda x, w: F.dropout(x, 0.3),
    "amax": lambda x, w: x.amax((2, 3)),
    "attention": lambda x, w: F.scaled_dot_product_attention(x, x, x),
    "attention, causal": lambda x, w: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "matmul": lambda x, w: x @ x.mT,
    "product": lambda x, w: x * x.flip(0),
    "einsum": lambda x, w: torch.einsum("bchw,bchv->bcwv", x, x),
}
MAPS = {
    "contiguous": lambda: torch.randn(2, 8, 16, 16),
    "channels last": lambda: torch.randn(2, 8, 16, 16).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 8, 16, 16).mT,
    "cut": lambda: torch.randn(2, 8, 17, 17)[..., 1:, 1:],
    "every other": lambda: torch.randn(2, 16, 16, 16)[:, ::2],
    "heads": lambda: torch.randn(2, 16, 8, 16).transpose(1, 2),
    "one sample": lambda: torch.randn(1, 8, 16, 16).expand(2, 8, 16, 16),
}


@pytest.mark.parametrize("layout", MAPS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_rows(name, layout):
    for autocast, dtype in [(False, torch.float32), (True, torch.float32), (False, brain)]:
        seed_torch(0)
        x = MAPS[layout]().to(dtype).detach().requires_grad_()
        for w_grad in (False, True):
            w = torch.randn(8, 8, 3, 3, dtype=dtype).requires_grad_(w_grad)
            (expected, plain), (found, ours) = both(OTHERS[name], x, w, autocast=autocast)
            what = f"w {w_grad}, autocast {autocast}, {dtype}"
            assert torch.equal(found, expected), what
            assert found.stride() == expected.stride(), what
            assert name.startswith("attention") or ours == plain, what
