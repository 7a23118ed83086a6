"""Attention's logits and entropy, and which layer blew up."""

import math

import pytest
import timm
import torch

import mesa_train
import mesa_train.models
from mesa_train.training.vit22b.stability import (
    AttentionWatch,
    DivergenceError,
    Guard,
    attention_statistics,
)


def tiny(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_22b_tiny", num_classes=10, img_size=56, **options).train()


def test_statistics_of_known_attention():
    q = torch.zeros(5, 2, 4)
    maximum, entropy = attention_statistics(q, torch.randn(5, 2, 4))
    assert maximum == 0
    assert entropy.item() == pytest.approx(math.log(5), rel=1e-6)
    k = torch.zeros(5, 2, 4)
    k[0] = 1000.0
    maximum, entropy = attention_statistics(torch.ones(5, 2, 4), k)
    assert maximum.item() == pytest.approx(4 * 1000 / 2)
    assert entropy.item() == pytest.approx(0.0, abs=1e-6)  # one-hot


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_watch_looks_now_and_then_and_changes_nothing(wrapped):
    model, images = tiny(), torch.randn(4, 3, 56, 56)
    if wrapped:
        mesa_train.wrap(model)
    expected = model(images)
    watch = AttentionWatch(model, every=2)
    seen = []
    for step in range(4):
        with watch.step(step):
            assert torch.equal(model(images), expected)
        seen.append(watch.row())
    assert [bool(row) for row in seen] == [True, False, True, False]
    assert len(seen[0]["logit_max"]) == len(seen[0]["entropy"]) == 3
    q = torch.cat([b.q_norm.weight for b in model.blocks])
    assert torch.equal(q, torch.ones(3 * 16))
    # Normalised queries and keys of 16 elements: |logit| is at most 16 / sqrt(16).
    assert max(seen[0]["logit_max"]) <= 4.0
    assert not any(m._forward_hooks for m in model.modules())
    with AttentionWatch(model, every=0).step(0):
        model(images)


def test_without_norms_logits_follow_the_weights():
    images, found = torch.randn(1, 3, 56, 56), {}
    for norm in ("rms", "none"):
        model = tiny(qk_norm=norm)
        with torch.no_grad():
            for block in model.blocks:
                block.in_proj.weight.mul_(30)
        watch = AttentionWatch(model, every=1)
        with watch.step(0):
            model(images)
        found[norm] = watch.row()
    # This is what the paper's norms are for.
    assert max(found["rms"]["logit_max"]) <= 4.0
    assert min(found["none"]["logit_max"]) > 40
    assert min(found["none"]["entropy"]) < 0.2 < min(found["rms"]["entropy"])


def test_the_guard_names_the_first_block():
    model, images = tiny(), torch.randn(2, 3, 56, 56)
    guard = Guard(model)
    with guard.step(6):
        loss = model(images).sum()
    guard.check(loss.item(), 1.0)
    with torch.no_grad():
        model.blocks[1].out_proj.bias.fill_(float("inf"))
    with guard.step(7):
        loss = model(images).sum()
    with pytest.raises(
        DivergenceError, match=r"step 8: the loss is nan; blocks\.1 is the first whose"
    ):
        guard.check(loss.item())
    with torch.no_grad():
        model.blocks[1].out_proj.bias.fill_(1e9)
    with guard.step(8):
        model(images)
    with pytest.raises(
        DivergenceError, match=r"gradient norm is 2e\+07; .*blocks\.1 grew most, to 1e\+09"
    ):
        guard.check(1.0, 2e7)
    assert not any(m._forward_hooks for m in model.modules())
