"""An activation, its gradient and that gradient's sum over the rows, in one pass over the codes."""

import pytest
import torch
import triton_interpreter

from mesa_train.kernels import reference, schemas
from mesa_train.kernels.triton import schemas as triton_schemas

SHAPES = ((1, 1, 1), (9, 1, 64), (12, 33, 7), (5, 197, 128), (70, 384, 128))


@pytest.fixture(params=["reference", "triton"])
def pair_sum(request):
    if request.param == "reference":
        return triton_schemas.activation_pair_sum
    request.getfixturevalue("triton")
    return triton_interpreter.apart().activation_pair_sum


@pytest.mark.parametrize(("rows", "cols", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", schemas.BITS)
def test_is_the_pair_and_the_sum_of_what_it_wrote(pair_sum, rows, cols, group_size, bits):
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("gelu",) if dtype == torch.float32 else ("silu",):
            coded = reference.affine_encode(torch.randn(rows, cols) * 2, bits, group_size, True, 0)
            grad = torch.randn(rows, 2 * cols).to(dtype)[:, ::2]
            dx, y, total = pair_sum(grad, *coded, bits, kind)
            eps = max(torch.finfo(dtype).eps, 5e-6)
            for ours, expected in zip(
                (dx, y), reference.activation_pair(grad, *coded, bits, kind), strict=True
            ):
                torch.testing.assert_close(ours, expected, rtol=eps, atol=eps)
            assert total.dtype == torch.float32
            # Of the rounded gradient: float32 sums of up to 70 in another order.
            torch.testing.assert_close(total, dx.float().sum(0), rtol=1e-5, atol=2e-5)


def test_many_tiles_and_a_rest(pair_sum):
    """Programs that walk several tiles, the last ones short: every row once, and the same bits again."""
    coded = reference.affine_encode(torch.randn(2101, 48), 8, 16, False, 0)
    grad = torch.randn(2101, 48)
    dx, _, total = pair_sum(grad, *coded, 8, "gelu")
    torch.testing.assert_close(total, dx.sum(0), rtol=1e-4, atol=1e-3)
    assert torch.equal(total, pair_sum(grad, *coded, 8, "gelu")[2])


def test_a_nan_stays_in_its_column(pair_sum):
    coded = reference.affine_encode(torch.randn(40, 64), 8, 32, False, 0)
    grad = torch.randn(40, 64)
    grad[7, 5] = float("nan")
    total = pair_sum(grad, *coded, 8, "gelu")[2]
    assert total.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty(pair_sum, shape):
    coded = reference.affine_encode(torch.randn(shape), 4, 64, False, 0)
    dx, y, total = pair_sum(torch.randn(shape), *coded, 4, "gelu")
    assert dx.shape == y.shape == shape
    assert torch.equal(total, torch.zeros(shape[1]))


def test_opcheck():
    coded = reference.affine_encode(torch.randn(6, 130), 4, 64, True, 1)
    args = (torch.randn(6, 130).bfloat16(), *coded, 4, "gelu")
    torch.library.opcheck(torch.ops.mesa_train.activation_pair_sum.default, args)
