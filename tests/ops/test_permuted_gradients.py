"""A gradient that arrives permuted, as of channels-last feature maps, costs a Linear one product.

PyTorch's matmul of a permuted 3- or 4-D tensor goes by batches and copies the weight for each."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mesa_train import Policy, compress


class Counted(TorchDispatchMode):
    """Names of the operators called, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", [F.linear, lambda x, w: x @ w.mT], ids=["linear", "matmul"])
def test_no_batched_product_for_a_permuted_gradient(function):
    x = torch.randn(2, 6, 5, 24, requires_grad=True)
    w = torch.randn(40, 24, requires_grad=True)
    grad = torch.randn(2, 40, 6, 5).permute(0, 2, 3, 1)
    expected = torch.autograd.grad(function(x, w), (x, w), grad)
    with compress(Policy(bits=32, min_bytes=0)):
        output = function(x, w)
    with Counted() as counted:
        found = torch.autograd.grad(output, (x, w), grad)
    assert "aten::bmm" not in counted.names
    assert counted.names.count("aten::mm") == 2
    # float32 rounding: the same sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
