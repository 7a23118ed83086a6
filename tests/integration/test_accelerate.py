"""`enable`: what a recipe's YAML may hold, and that it can be taken back. Two processes are in
tests/integration."""

import pytest
import torch
from torch import nn

from mesa_train import PRESETS, Policy
from mesa_train.engine.wrap import policy_of

accelerate = pytest.importorskip("accelerate")

from mesa_train.integrations.accelerate import enable  # noqa: E402


@pytest.fixture
def accelerator():
    return accelerate.Accelerator(cpu=True)


GIVEN = {
    "a policy": (Policy(bits=4), Policy(bits=4)),
    "a preset": ("mesa4", PRESETS["mesa4"]),
    "true": (True, PRESETS["mesa8"]),
    "fields": ({"bits": 4, "group_size": 32}, Policy(bits=4, group_size=32)),
    "a preset and fields": (
        {"preset": "mesa8-recompute", "min_bytes": 0},
        Policy(recompute="linear", min_bytes=0),
    ),
    "false": (False, None),
    "null": (None, None),
}


@pytest.mark.parametrize("given", GIVEN)
def test_what_a_file_may_hold(accelerator, given):
    policy, expected = GIVEN[given]
    assert enable(accelerator, policy) is accelerator
    model = nn.Linear(4, 4)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, _ = accelerator.prepare(model, optimizer)
    assert policy_of(accelerator.unwrap_model(prepared)) == expected


def test_calling_again_replaces(accelerator):
    enable(enable(accelerator, "mesa4"), "mesa8")
    assert policy_of(accelerator.prepare(nn.Linear(4, 4))) == PRESETS["mesa8"]
    enable(accelerator, False)
    assert policy_of(accelerator.prepare(nn.Linear(4, 4))) is None
    assert "prepare" not in vars(accelerator)


def test_errors(accelerator):
    with pytest.raises(TypeError, match="accelerator must be an Accelerator, got Linear"):
        enable(nn.Linear(2, 2), "mesa8")
    with pytest.raises(ValueError, match="unknown preset 'mesa'"):
        enable(accelerator, "mesa")
    with pytest.raises(ValueError, match="unknown policy field 'bit'"):
        enable(accelerator, {"bit": 8})
    with pytest.raises(TypeError, match="policy must be a Policy"):
        enable(accelerator, 8)
    assert "prepare" not in vars(accelerator)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_each_test_begins_with_no_accelerator(precision):
    """`tests/conftest.py` forgets Accelerate's state, which refuses a second precision."""
    assert accelerate.Accelerator(cpu=True, mixed_precision=precision).mixed_precision == precision
