"""Triton: the activations and their derivatives, at float32 values that were decoded from codes.

Their error is about 1e-6, far below the error of a code. `exp` is the hardware's. A quotient is
exact to two units in the last place. `KIND` is a constexpr, so a compiled kernel contains the code
of one activation only.
"""
# ruff: noqa: ANN001, ANN201, ANN202 (a kernel's parameters and results have Triton's types)
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh_argument(x):
    # (1 + tanh(a)) / 2 is the sigmoid of 2 a.
    return 1.59576912 * (x + 0.044715 * x * x * x)


@triton.jit
def _hard(x):
    y = x + 3.0
    return tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y)) / 6.0


@triton.jit
def _mish_excess(x):
    # tanh(softplus(x)) = n / (n + 2) with n = e * e + 2 * e and e = exp(x). It is 1 for x beyond
    # 20.
    e = tl.exp(x)
    return e * (e + 2.0)


@triton.jit
def _log1p(y):
    """log(1 + y) for y in [0, 1], computed through atanh."""
    s = y / (2.0 + y)
    t = s * s
    p = tl.fma(t, 1.0 / 13.0, 1.0 / 11.0)
    p = tl.fma(p, t, 1.0 / 9.0)
    p = tl.fma(p, t, 1.0 / 7.0)
    p = tl.fma(p, t, 1.0 / 5.0)
    p = tl.fma(p, t, 1.0 / 3.0)
    return 2.0 * s * tl.fma(p, t, 1.0)


@triton.jit
def _bell(x):
    """exp(-x * x / 2)."""
    return tl.exp2(-0.7213475204444817 * x * x)


@triton.jit
def _gelu_cdf(x, bell):
    """The integral of the normal distribution up to x, absolute error 1e-7.

    Formula 7.1.26 of Abramowitz and Stegun, which uses the same exponential as the density.
    """
    t = 1.0 / tl.fma(tl.abs(x), 0.3275911 * 0.7071067811865476, 1.0)
    p = tl.fma(t, 1.061405429, -1.453152027)
    p = tl.fma(p, t, 1.421413741)
    p = tl.fma(p, t, -0.284496736)
    p = tl.fma(p, t, 0.254829592)
    tail = 0.5 * p * t * bell
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def value(x, KIND: tl.constexpr):
    """KIND(x)."""
    if KIND == "gelu":
        return x * _gelu_cdf(x, _bell(x))
    elif KIND == "gelu_tanh":
        return x * _sigmoid(_tanh_argument(x))
    elif KIND == "silu":
        return x * _sigmoid(x)
    elif KIND == "quick_gelu":
        return x * _sigmoid(1.702 * x)
    elif KIND == "relu":
        return tl.where(x < 0, 0.0, x)
    elif KIND == "leaky_relu":
        return tl.where(x > 0, x, 0.01 * x)
    elif KIND == "hardswish":
        return x * _hard(x)
    elif KIND == "hardsigmoid":
        return _hard(x)
    elif KIND == "softplus":
        soft = tl.where(x > 0, x, 0.0) + _log1p(tl.exp(-tl.abs(x)))
        return tl.where(x == x, soft, x)
    elif KIND == "mish":
        n = _mish_excess(tl.where(x > 20, 20.0, x))
        return x * (n / (n + 2.0))
    else:
        tl.static_assert(KIND == "elu", "no such activation")
        return tl.where(x > 0, x, tl.exp(x) - 1.0)


@triton.jit
def slope(x, KIND: tl.constexpr):
    """The derivative of KIND at x."""
    if KIND == "gelu":
        bell = _bell(x)
        return tl.fma(x, 0.3989422804014327 * bell, _gelu_cdf(x, bell))
    elif KIND == "gelu_tanh":
        x = tl.where(x < -20, -20.0, tl.where(x > 20, 20.0, x))  # so x * x cannot overflow
        s = _sigmoid(_tanh_argument(x))
        return s + s * (1.0 - s) * 1.59576912 * x * (1.0 + 0.134145 * x * x)
    elif KIND == "silu":
        s = _sigmoid(x)
        return s + x * s * (1.0 - s)
    elif KIND == "quick_gelu":
        s = _sigmoid(1.702 * x)
        return s + 1.702 * x * s * (1.0 - s)
    elif KIND == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    elif KIND == "leaky_relu":
        return tl.where(x > 0, 1.0, 0.01)
    elif KIND == "hardswish":
        return tl.where(x <= -3, 0.0, tl.where(x >= 3, 1.0, x / 3.0 + 0.5))
    elif KIND == "hardsigmoid":
        return tl.where((x > -3) & (x < 3), 1.0 / 6.0, 0.0)
    elif KIND == "softplus":
        return _sigmoid(x)
    elif KIND == "mish":
        x = tl.where(x > 20, 20.0, x)
        n = _mish_excess(x)
        r = 1.0 / (n + 2.0)
        t = n * r
        return t + x * _sigmoid(x) * 2.0 * r * (1.0 + t)
    else:
        tl.static_assert(KIND == "elu", "no such activation")
        return tl.where(x > 0, 1.0, tl.exp(x))
