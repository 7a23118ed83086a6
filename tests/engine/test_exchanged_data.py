"""A parameter whose `.data` is exchanged between forward and backward: the backward reads what PyTorch's
reads. A Linear saves a view of its weight, and autocast saves a cast, so both read the old data; a norm
saves the parameter itself and reads the new."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mesa_train import Policy, wrap


class Scaled(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))


class Times(Scaled):
    def forward(self, x):
        return x * self.weight


class Product(Scaled):
    def forward(self, x):
        return x @ self.weight


class Transposed(Scaled):
    def forward(self, x):
        return x @ self.weight.t()


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.linear(x) * self.scale


MODULES = {
    "linear": lambda: nn.Linear(8, 8),
    "linear without bias": lambda: nn.Linear(8, 8, bias=False),
    "conv": lambda: nn.Conv2d(2, 4, 3),
    "pointwise": lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1)),
    "layer_norm": lambda: nn.LayerNorm(8),
    "rms_norm": lambda: nn.RMSNorm(8),
    "batch_norm": lambda: nn.BatchNorm2d(2),
    "group_norm": lambda: nn.GroupNorm(2, 2),
    "mul": lambda: Times(8),
    "matmul": lambda: Product(8, 8),
    "matmul of a view": lambda: Transposed(8, 8),
    "norm and linear": lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)),
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
    "layer scale": LayerScale,
}
# Lossless, and every matmul rebuilt: recipes hold parameters too.
EXACT = [
    Policy(bits=32, min_bytes=0),
    Policy(bits=32, min_bytes=0, recompute="linear"),
]


def gradients(model, x, exchange, autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
    if exchange:
        vector = nn.utils.parameters_to_vector(model.parameters()).detach()
        nn.utils.vector_to_parameters(3 * vector, model.parameters())
    # Not the output itself, of which a norm's backward takes nearly everything away.
    output.float().flatten().dot(torch.linspace(-1, 2, output.numel())).backward()
    return [x.grad, *[p.grad for p in model.parameters()]]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("policy", EXACT, ids=["lossless", "recompute"])
@pytest.mark.parametrize("name", MODULES)
def test_the_backward_reads_the_data_that_pytorch_reads(name, policy, autocast):
    torch.manual_seed(0)
    model = MODULES[name]()
    spatial = any(isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)) for m in model.modules())
    x = torch.randn(2, 2, 8, 8) if spatial else torch.randn(2, 4, 8)
    expected = gradients(copy.deepcopy(model), x, True, autocast)
    found = gradients(wrap(copy.deepcopy(model), policy), x, True, autocast)
    kept = gradients(copy.deepcopy(model), x, False, autocast)
    # The rounding of bfloat16 (2 ** -8), where a backward multiplies in another order.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    for a, b, c in zip(found, expected, kept, strict=True):
        scale = b.abs().max()
        torch.testing.assert_close(a / scale, b / scale, **tolerance)
        # Old and new data differ by a factor of 3, so the two are told apart wherever they differ.
        assert torch.equal(b, c) or (b - c).abs().max() > 0.1 * scale


def test_an_alias_is_no_copy():
    """The alias shares the parameter's storage and version: a write in place is still reported."""
    model = wrap(nn.Linear(8, 8), "lossless")
    x = torch.randn(4, 8, requires_grad=True)
    output = F.gelu(model(x)).sum()
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()
