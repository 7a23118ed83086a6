"""The paper's schedule and decay."""

import pytest
import timm
import torch

import mesa_train.models  # noqa: F401
from mesa_train.training.vit22b.schedule import ReciprocalSqrt, groups


def test_the_published_points():
    schedule = ReciprocalSqrt(1e-3, 10_000, 30_000, 177_000)
    assert schedule(0) == 0
    assert schedule(5_000) == pytest.approx(5e-4)
    assert schedule(10_000) == pytest.approx(1e-3)
    assert schedule(100_000) == pytest.approx(1e-3 / 10**0.5)
    assert schedule(147_000) == pytest.approx(1e-3 / (1 + 13.7) ** 0.5)
    assert schedule(162_000) == pytest.approx(0.5e-3 / (1 + 15.2) ** 0.5)
    assert schedule(177_000) == 0
    assert schedule(200_000) == 0
    assert ReciprocalSqrt(1.0, 0, 0, 10)(0) == 1
    # Warm-up and cool-down may meet.
    assert ReciprocalSqrt(1.0, 4, 6, 10)(4) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((1e-3, 60, 50, 100), "warmup=60 and cooldown=50 exceed the 100 steps"),
        ((1e-3, -1, 0, 100), "warmup=-1 must not be negative"),
        ((1e-3, 0, -1, 100), "cooldown=-1 must not be negative"),
        ((1e-3, 0, 0, 0), "timescale=10000 and total=0 must be positive"),
        ((1e-3, 0, 0, 100, 0), "timescale=0 and total=100 must be positive"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises(ValueError, match=said):
        ReciprocalSqrt(*arguments)


def test_the_head_decays_by_its_own_value():
    with torch.device("meta"):
        model = timm.create_model("vit_22b_tiny")
    found = {g["name"]: g for g in groups(model)}
    assert {n: g["weight_decay"] for n, g in found.items()} == {
        "body": 0.03, "head": 3.0, "no_decay": 0.0,
    }  # fmt: skip
    assert [p.shape for p in found["head"]["params"]] == [(1000, 64)]
    names = {id(p): n for n, p in model.named_parameters()}
    plain = {names[id(p)] for p in found["no_decay"]["params"]}
    assert {"pos_embed", "attn_pool.latent", "head.bias", "blocks.0.in_proj.mlp_bias"} <= plain
    assert not any(n.endswith(("in_proj.weight", "out_proj.weight")) for n in plain)
    assert sum(len(g["params"]) for g in found.values()) == len(names)
    model.blocks.requires_grad_(False)
    assert sum(len(g["params"]) for g in groups(model)) < len(names)
