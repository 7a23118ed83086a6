"""HiLo against the authors' layer, and where it goes beyond it."""

import golden
import numpy as np
import pytest
import torch
from torch import nn

import mesa_train
from mesa_train.models.lit.hilo import HiLo

# name: height, width, window, alpha
CASES = {
    "sq14": (14, 14, 2, 0.9),
    "pad15x13": (15, 13, 2, 0.9),
    "rect12x16": (12, 16, 2, 0.9),
    "alpha00": (14, 14, 2, 0.0),
    "alpha05": (14, 14, 2, 0.5),
    "alpha10": (14, 14, 2, 1.0),
    "ws1": (7, 7, 1, 0.9),
    "ws4pad14": (14, 14, 4, 0.9),
    "pad15x13_alpha10": (15, 13, 2, 1.0),
}


@pytest.fixture(scope="module")
def reference():
    with golden.arrays("hilo") as arrays:
        return dict(arrays)


def test_the_table_has_every_case(reference):
    assert sorted(CASES) == sorted(reference["cases"].tolist())


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_authors(case, reference):
    height, width, window, alpha = CASES[case]
    layer = golden.fill(HiLo(384, 12, window, alpha, qkv_bias=True))
    tokens = golden.images(2, height * width, 384)
    with torch.no_grad():
        out = layer(tokens.view(2, height, width, 384)).reshape(2, height * width, 384).numpy()
    # The authors' own float32 is 3e-6 from their float64.
    np.testing.assert_allclose(
        out[:, :, :: reference[f"{case}_sub"]], reference[f"{case}_out"], atol=1e-5, rtol=0
    )
    wide = out.astype(np.float64)
    for name, axis in (("token", 2), ("chan", (0, 1))):
        np.testing.assert_allclose(wide.sum(axis), reference[f"{case}_{name}_sum"], atol=1e-3)
        np.testing.assert_allclose(
            (wide**2).sum(axis), reference[f"{case}_{name}_sumsq"], rtol=1e-4
        )


@pytest.mark.parametrize(
    ("heads", "alpha", "lo"), [(12, 0.9, 10), (16, 0.9, 14), (12, 0.7, 8), (12, 0.2, 2)]
)
def test_heads_are_split_as_python_truncates(heads, alpha, lo):
    layer = HiLo(32 * heads, heads, 2, alpha)
    assert (layer.lo_heads, layer.hi_heads) == (lo, heads - lo)


def test_flops_are_the_authors():
    assert HiLo(384, 12, 2, 0.5).flops(14, 14) == 83_467_776
    assert HiLo(768, 12, 2, 0.9).flops(14, 14) == 298_296_320


def test_window_of_one_is_plain_attention():
    layer = HiLo(32, 4, window=1)
    plain = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([layer.l_q.weight, layer.l_kv.weight]))
        plain.in_proj_bias.zero_()
        plain.out_proj.weight.copy_(layer.l_proj.weight)
        plain.out_proj.bias.copy_(layer.l_proj.bias)
    x = torch.randn(2, 3, 5, 32)
    expected = plain(*[x.view(2, 15, 32)] * 3, need_weights=False)[0]
    torch.testing.assert_close(layer(x).reshape(2, 15, 32), expected)


@pytest.mark.parametrize("policy", mesa_train.PRESETS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gradients_under_every_preset(policy, alpha):
    layer = HiLo(64, 4, 2, alpha, qkv_bias=True)
    layer = nn.Sequential(nn.LayerNorm(64), layer)
    x = torch.randn(4, 9, 7, 64)

    def gradient():
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        (out * torch.linspace(-1, 1, 64)).sum().backward()
        return out.detach(), torch.cat(
            [leaf.grad.flatten(), *[p.grad.flatten() for p in layer.parameters()]]
        )

    out, expected = gradient()
    mesa_train.wrap(layer, policy)
    output, wrapped_gradient = gradient()
    assert torch.equal(output, out)
    # Lossless differs by summation order; a code of 8 bits is 0.7 % off, one of 4 bits 16 %.
    few_bits = policy.startswith(("mesa4", "mesa3"))
    bound = 1e-5 if policy == "lossless" else 0.3 if few_bits else 0.02
    assert (wrapped_gradient - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 30, "num_heads": 4}, "dim=30 must be a multiple of num_heads=4"),
        ({"dim": 32, "window": 0}, "window must be at least 1, got 0"),
        ({"dim": 32, "alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        HiLo(**arguments)
