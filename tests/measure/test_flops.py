"""Operations of a forward by module, against formulas."""

import timm
import torch
from torch import nn

import mesa_train
import mesa_train.models  # registers HVT with timm
from mesa_train.measure.flops import flops


def test_operations_of_a_model_are_those_of_its_formula():
    with torch.device("meta"):
        model = timm.create_model("hvt_ti_1", depth=2, num_classes=10).train()
    counted = flops(model, torch.empty(2, 3, 224, 224, device="meta"))
    width, before, after = 192, 196, 97  # the first block pools
    blocks = [12 * tokens * width**2 + 2 * tokens**2 * width for tokens in (before, after)]
    multiply_adds = before * 768 * width + sum(blocks) + width * 10
    assert counted.total == 2 * 2 * multiply_adds
    assert counted.by_module["head"] == 2 * 2 * width * 10
    assert counted.by_module["blocks.1.attn"] == 2 * 2 * 2 * after**2 * width
    assert sum(counted.by_module.values()) == sum(counted.by_operator.values()) == counted.total


class Shared(nn.Module):
    """One layer that runs twice, and a product of the module itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(self.inner(x)) @ x.mT


def test_a_wrapped_model_on_real_tensors_counts_as_plain():
    model, x = Shared(), torch.randn(4, 8)
    plain = flops(model, x)
    assert plain.by_module == {"inner": 2 * 2 * 4 * 64, "": 2 * 4 * 8 * 4}
    assert flops(mesa_train.wrap(model, "mesa8"), x) == plain
    assert model.inner.weight.grad is None
