"""Rows that save neither the tensor nor 8-bit codes of it: signs, indices, the output of exp."""

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch

from mesa_train import Policy, compress
from mesa_train.utils.clipped_sign import clipped_sign

EIGHT = Policy(min_bytes=0)


def rows(mode):
    return {key[1:]: size for key, (_, size) in mode.recorder.report.rows.items()}


def of_signs(y, policy):
    """(output, gradients) of codes that go through two matmuls, and the mode."""
    leaf, w = y.clone().requires_grad_(), torch.arange(8.0).view(4, 2).requires_grad_()
    with compress(policy) as mode:
        h = clipped_sign(leaf * 1)
        out = (h @ w).sum() + (h.mT @ h).trace()
    return out.detach(), torch.autograd.grad(out, (leaf, w)), mode


@pytest.mark.parametrize("zeros", [False, True])
def test_codes_of_one_bit_are_lossless(zeros):
    y = torch.tensor([[-2.0, -1.0, -0.5, 0.25], [0.99, 1.0, 3.0, -0.1]]).repeat(8, 1)
    if zeros:
        y[3, 2] = 0
    plain, expected, _ = of_signs(y, Policy(enabled=False))
    for policy in (EIGHT, Policy(bits=32, min_bytes=0), Policy(bits=2, min_bytes=0)):
        output, found, _ = of_signs(y, policy)
        assert torch.equal(output, plain)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    saved = rows(of_signs(y, EIGHT)[2])
    assert saved["clipped_sign", "input", "1 bit"] == 64 // 8
    assert saved["clipped_sign", "output", "2 bit" if zeros else "1 bit"] == (1 + zeros) * 64 // 8
    assert not any(
        key[0] == "matmul" and key[2].startswith("8") for key in saved if key[1] != "right"
    )


def test_a_sign_without_a_mode_is_a_plain_function():
    y = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.99, 1.0, 3.0], requires_grad=True)
    sign = clipped_sign(y)
    assert sign.tolist() == [-1, -1, -1, 0, 1, 1, 1]
    (sign * torch.arange(1.0, 8.0)).sum().backward()
    assert y.grad.tolist() == [0, 0, 3, 4, 5, 0, 0]


def test_small_elements_of_an_exponential_are_as_exact_as_large_ones():
    x = (torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 3).requires_grad_()
    (expected,) = torch.autograd.grad(torch.log(1 + x.exp()).sum(), x)
    with compress(EIGHT) as mode:
        y = x.exp()
        out = torch.log(1 + y).sum()
    (found,) = torch.autograd.grad(out, x)
    # bfloat16 rounds to 8 significant bits.
    assert ((found - expected).abs() <= expected / 256).all()
    assert rows(mode)["exp", "output", "bfloat16"] == 2 * x.numel()


def test_a_gather_that_repeats_codes_its_input_once():
    x = torch.randn(2, 16, 32, requires_grad=True)
    index = torch.randint(16, (2, 64, 1)).expand(-1, -1, 32)
    with compress(EIGHT) as mode:
        source = x * 1
        out = source.gather(1, index).mT @ torch.randn(2, 64, 8, requires_grad=True)
    saved = rows(mode)
    assert saved["gather", "index", "uint8"] == 2 * 64
    assert saved["gather", "right", str(mode.recorder.codec("matmul", "right"))] < 1.2 * x.numel()
    assert out.requires_grad


def test_coordinates_of_every_pair_are_rebuilt_bit_for_bit():
    seed_torch(0)
    table, at = torch.randn(1, 4, 15, 15), torch.rand(1, 64, 2) * 2 - 1

    def sampled(policy, write=False):
        inputs = [t.clone().requires_grad_() for t in (table, at)]
        positions = inputs[1] * 1
        with compress(policy) as mode:
            pairs = (positions.view(64, 1, 2) - positions.view(1, 64, 2)) * 0.5
            out = F.grid_sample(inputs[0] * 1, pairs[None].flip(-1), align_corners=True)
        if write:
            with torch.no_grad():
                positions += 1
        out.square().sum().backward()
        return [t.grad for t in inputs], mode

    plain, _ = sampled(Policy(enabled=False))
    for policy in (Policy(min_bytes=0, overrides={"mul": {"bits": 32}}), EIGHT):
        for write in (False, True):
            found, mode = sampled(policy, write)
            # The images are coded, and only the gradient of the coordinates reads them.
            assert torch.equal(found[0], plain[0])
            assert (found[1] - plain[1]).norm() < 0.02 * plain[1].norm()
    assert rows(mode)["grid_sample", "saved", "rebuilt"] == 0
    assert not any(key[2].startswith("uncompressed: exact") for key in rows(mode))
