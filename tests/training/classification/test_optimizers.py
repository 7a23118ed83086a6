"""The official recipe's parameter groups and schedule, against the numbers its authors' code gives."""

import pytest
import timm
import torch

import mesa_train.models  # noqa: F401  registers them with timm
from mesa_train.training.classification.config import Config, OptimConfig
from mesa_train.training.classification.optimizers import (
    Schedule,
    build,
    groups,
    scaled,
    state_bytes,
)


@pytest.fixture(scope="module")
def litv2_s():
    with torch.device("meta"):
        return timm.create_model("litv2_s")


def test_groups_of_litv2_s(litv2_s):
    found = {g["name"]: g for g in groups(litv2_s, OptimConfig(), 1024)}
    assert list(found) == ["weights", "no_decay", "offsets"]
    assert len(found["no_decay"]["params"]) == 130
    assert len(found["offsets"]["params"]) == 3
    assert sum(p.numel() for p in found["offsets"]["params"]) == 21_504
    assert (found["weights"]["lr"], found["weights"]["weight_decay"]) == (1e-3, 0.05)
    assert (found["no_decay"]["lr"], found["no_decay"]["weight_decay"]) == (1e-3, 0.0)
    assert (found["offsets"]["lr"], found["offsets"]["weight_decay"]) == (1e-5, 0.05)
    assert sum(len(g["params"]) for g in found.values()) == len(list(litv2_s.parameters()))


def rates(config, epoch):
    model = timm.create_model("litv2_tiny")
    optimizer = build(config, groups(model, config, 1024))
    schedule = Schedule(optimizer, config, 1024, epochs=300, steps=1251)
    schedule.at(round(1251 * epoch))
    return {g["name"]: g["lr"] for g in optimizer.param_groups}


def test_schedule_is_the_official_one():
    config = OptimConfig()
    assert rates(config, 0)["weights"] == pytest.approx(1e-6)
    assert rates(config, 10)["weights"] == pytest.approx((1e-6 + 1e-3) / 2)
    # The warm-up lies inside the cosine's time: it ends at 9.89e-4 and not at 1e-3.
    assert rates(config, 20)["weights"] == pytest.approx(9.89e-4, rel=1e-3)
    assert rates(config, 299.999)["weights"] == pytest.approx(1e-5, rel=1e-2)
    # The floor is every group's, so the offsets' rate hardly moves after the warm-up.
    for epoch in (20, 100, 299):
        assert rates(config, epoch)["offsets"] == pytest.approx(1e-5, rel=1e-2)


def test_offsets_decay_with_a_floor_of_their_own():
    config = OptimConfig(offset_floor="scaled")
    assert rates(config, 20)["offsets"] == pytest.approx(9.89e-6, rel=1e-3)
    assert rates(config, 299.999)["offsets"] == pytest.approx(1e-7, rel=1e-2)


def test_rates_scale_linearly_or_not_at_all():
    assert scaled(OptimConfig(), 5e-4, 256) == 2.5e-4
    assert scaled(OptimConfig(lr_batch=0), 5e-4, 256) == 5e-4


def test_frozen_parameters_are_left_out():
    model = timm.create_model("litv2_tiny", num_classes=10)
    for parameter in model.layers.parameters():
        parameter.requires_grad_(False)
    found = groups(model, OptimConfig(), 512)
    assert [g["name"] for g in found] == ["weights", "no_decay"]
    assert sum(len(g["params"]) for g in found) == 8


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit"])
def test_an_optimizer_has_the_configurations_numbers(name):
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    config = OptimConfig(name=name, betas=(0.8, 0.95), eps=1e-6)
    made = build(config, [{"params": [torch.nn.Parameter(torch.zeros(8))], "lr": 0.25}])
    (group,) = made.param_groups
    assert (group["lr"], tuple(group["betas"])) == (0.25, (0.8, 0.95))
    assert name == "lion8bit" or group["eps"] == 1e-6
    kind = {"adamw": "AdamW", "adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
    assert type(made).__name__ == kind.get(name, "Lion8bit")


def test_state_sizes():
    tensors = [torch.empty(4096), torch.empty(100)]
    assert state_bytes("adamw", tensors) == 8 * 4196 + 2 * 4
    assert state_bytes("adamw8bit", tensors) == 2 * (4096 + 4 * 16) + 8 * 100
    assert state_bytes("lion8bit", tensors) == 4096 + 4 * 16 + 4 * 100
    assert Config().optim.name == "adamw"
