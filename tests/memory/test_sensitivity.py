"""How the variance of codes goes with their bits: the theory, and what codes of noise show."""

import pytest
import torch

from mesa_train.codecs.affine import Affine
from mesa_train.memory.sensitivity import typical
from mesa_train.memory.sites import Site

# A grid of 2**bits - 1 steps over the range has an error of step**2 / 12, so variances go with the
# squared number of steps: 255 at 8 bits, 15 at 4, 3 at 2.
STEPS = {8: 255, 4: 15, 2: 3}


def variance(bits):
    """Mean squared error of the codes of uniform noise, groups so long that each spans it."""
    x = torch.rand(64, 1024, generator=torch.Generator().manual_seed(0))
    codec = Affine(bits, group_size=1024)
    return (codec.decode(codec.encode(x), 1024, torch.float32) - x).square().mean().item()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_variance_of_the_codes_of_noise(bits):
    # A scale is rounded up to bfloat16, by at most 2**-7: its square is at most 1.6 % more.
    assert variance(bits) == pytest.approx(1 / (12 * STEPS[bits] ** 2), rel=0.03)


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("kind", ["variance", "coupled"])
def test_the_planner_extrapolates_as_the_codes_do(bits, kind):
    source = Site(("0", "layer_norm", "normalized"), 0, [(8, 64)], 2048)
    rebuilt = Site(("0", "attention", "q"), 1, [(8, 64)], 2048, "0.qkv", source.key)
    said = getattr(typical([source, rebuilt]), kind)
    ratio = said[source.key, bits] / said[source.key, 4]
    assert ratio == pytest.approx((STEPS[4] / STEPS[bits]) ** 2)
    assert ratio == pytest.approx(variance(bits) / variance(4), rel=0.05)
