"""Deformable token merging against plain convolution and against a literal evaluation of its rule."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mesa_train.models.lit.deformable_merging import DeformableMerging, DeformConv


def sampled(image, y, x):
    """Bilinear value of one channel (H, W) at a point; outside the map everything is zero."""
    height, width = image.shape
    total = 0.0
    for row, column in itertools.product(
        (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
    ):
        if 0 <= row < height and 0 <= column < width:
            total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column].item()
    return total


def test_it_samples_where_the_offsets_say():
    layer = DeformConv(3, 4)
    for parameter in layer.conv_offset.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    image = torch.randn(1, 3, 7, 6)
    offsets = layer.conv_offset(image)[0]
    expected = torch.zeros(4, 3, 3)
    for i, j, ky, kx in itertools.product(range(3), range(3), range(2), range(2)):
        tap = 2 * ky + kx
        dy, dx = offsets[2 * tap, i, j].item(), offsets[2 * tap + 1, i, j].item()
        values = torch.tensor([sampled(c, 2 * i + ky + dy, 2 * j + kx + dx) for c in image[0]])
        expected[:, i, j] += layer.weight[:, :, ky, kx].detach() @ values
    expected += layer.bias.detach()[:, None, None]
    torch.testing.assert_close(layer(image)[0].detach(), expected, atol=1e-5, rtol=1e-5)


def test_fresh_it_is_a_plain_convolution():
    layer = DeformConv(8, 16)
    for size in ((6, 8), (7, 5)):
        image = torch.randn(3, 8, *size)
        plain = F.conv2d(image, layer.weight, layer.bias, stride=2)
        torch.testing.assert_close(layer(image), plain, atol=1e-5, rtol=1e-5)


def test_the_offsets_learn():
    layer = DeformableMerging(8, 16)
    layer(torch.randn(5, 8, 8, 8)).square().sum().backward()
    assert layer.dconv.conv_offset.weight.grad.norm() > 0


def test_flops_follow_the_formula():
    # M (4c 12 + 12) + M (4c 2c + 2c) + 2c M as the authors count, with M = 28 * 28.
    assert DeformableMerging(96, 192).flops(56, 56, offsets=12) == 784 * (4620 + 73920 + 192)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_do_not_crash_and_do_not_vanish(value):
    layer = DeformConv(8, 16)
    torch.nn.init.normal_(layer.conv_offset.weight)
    image = torch.randn(2, 8, 8, 8)
    image[1, 3, 5, 2] = value
    out = layer(image.requires_grad_())
    assert not out.isfinite().all()
    out.nan_to_num().sum().backward()
    layer.conv_offset.bias.data[2] = value
    assert not layer(torch.randn(1, 8, 4, 4)).isfinite().all()
