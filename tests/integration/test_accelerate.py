"""`enable`: what a recipe's YAML may hold, and that it can be taken back. `capture_step`: the same
numbers as Accelerate's own loop. Two processes are in test_data_parallel.py."""

import pytest
import torch
import torch.nn.functional as F
from graph_recorder import record  # noqa: F401  a fixture
from torch import nn

import mesa_train
from mesa_train import PRESETS, CaptureError, Policy
from mesa_train.engine.wrap import policy_of

accelerate = pytest.importorskip("accelerate")

from mesa_train.integrations.accelerate import capture_step, enable  # noqa: E402


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


def test_a_captured_step_equals_accelerates_own_loop(record):  # noqa: F811
    """bf16, accumulation, clipping and a prepared schedule."""

    def prepared():
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2
        )
        model = mesa_train.wrap(nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return accelerator, *accelerator.prepare(model, optimizer, schedule)

    data = [(torch.randn(8, 6), torch.randint(4, (8,))) for _ in range(12)]
    accelerator, other, optimizer, schedule = prepared()
    losses = []
    for x, y in data:
        with accelerator.accumulate(other):
            loss = F.cross_entropy(other(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(other.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.detach())

    accelerator, model, optimizer, schedule = prepared()
    recorder = record(model, optimizer.optimizer)
    step = capture_step(accelerator, model, F.cross_entropy, optimizer, clip_norm=0.1)
    for (x, y), expected in zip(data, losses, strict=True):
        assert torch.equal(step(x, y), expected)
        if step.completed:
            schedule.step()
    for ours, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, expected)
    assert recorder.log.count("replay") == 9


def test_the_scaler_and_captures_that_are_refused(record, monkeypatch):  # noqa: F811
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    record(model)
    accelerator.scaler = torch.amp.GradScaler("cpu")  # as with fp16 on a GPU
    assert capture_step(accelerator, model, None, optimizer)._update.scaler is accelerator.scaler
    with pytest.raises(TypeError, match=r"use mesa_train\.integrations\.accelerate\.capture_step"):
        mesa_train.capture_step(model, None, optimizer)
    for name in ("FSDP", "DEEPSPEED", "MULTI_CPU"):
        monkeypatch.setattr(
            accelerator.state, "distributed_type", accelerate.DistributedType[name], raising=False
        )
        with pytest.raises(CaptureError, match=f"Accelerate uses {name}; use one GPU or DDP"):
            capture_step(accelerator, model, None, optimizer)
