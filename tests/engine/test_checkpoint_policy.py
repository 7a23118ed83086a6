"""`Policy(checkpoint=...)`: modules that keep their inputs alone and run again in the backward."""

import pytest
import timm
import torch
from torch import nn

import mesa_train
from mesa_train import Policy
from mesa_train.engine.wrap import report_of
from mesa_train.measure.footprint import footprint


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=10).train()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(32, 3, 32, 32)


def gradients(model, images):
    model.zero_grad()
    model(images).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


PLAIN_INSIDE = {"blocks.*": {"enabled": False}}


def test_exact_where_inputs_are_whole_and_insides_plain(vit, images):
    before = gradients(vit, images)
    policy = Policy(checkpoint=["blocks.*"], overrides={"*": {"enabled": False}})
    assert all(map(torch.equal, gradients(mesa_train.wrap(vit, policy), images), before))


def test_the_same_as_checkpointing_by_hand(vit, images):
    hand = footprint(vit, images, policy="mesa8+checkpoint").saved_bytes
    assert footprint(vit, images, policy=Policy(checkpoint=["blocks.*"])).saved_bytes == hand
    mesa_train.wrap(vit, "mesa8")
    vit.set_grad_checkpointing()
    expected = gradients(vit, images)
    vit.set_grad_checkpointing(False)
    mesa_train.wrap(vit, Policy(checkpoint=["blocks.*"]))
    assert all(map(torch.equal, gradients(vit, images), expected))


@pytest.mark.parametrize("bits", [8, 4, 2, 32])
@pytest.mark.parametrize("everywhere", [True, False])
def test_bytes_of_the_inputs(vit, images, bits, everywhere):
    """Of the blocks nothing is kept but their inputs: 5 tokens of 192 float32 an image."""
    whole = 32 * 5 * 192 * 4
    coded = 32 * 5 * (192 * bits // 8 + 2 * 2 * 2)  # two groups of 128 and 64, bfloat16 pairs
    inputs = {"checkpoint_inputs": bits} if everywhere else {}
    overrides = dict(PLAIN_INSIDE)
    overrides["blocks.*:checkpoint"] = {"enabled": True, "checkpoint_inputs": bits}
    policy = Policy(checkpoint=["blocks.*"], min_bytes=0, overrides=overrides, **inputs)
    kept = footprint(vit, images, policy=policy)
    own = {m: size for m, size in kept.by_module.items() if m.startswith("blocks")}
    assert own == dict.fromkeys(
        ["blocks.0", "blocks.1", "blocks.2"], whole if bits == 32 else coded
    )


def test_one_block_of_three(vit, images):
    """The others keep what they kept, and the reports say whose input it is."""
    without = footprint(vit, images, policy=Policy(min_bytes=0))
    policy = Policy(checkpoint=["blocks.1"], checkpoint_inputs=8, min_bytes=0)
    kept = footprint(vit, images, policy=policy)
    for module, size in without.by_module.items():
        if not module.startswith("blocks.1"):
            assert kept.by_module[module] == size
    assert kept.saved_bytes < without.saved_bytes
    mesa_train.wrap(vit, policy)
    vit(images)
    coded = [key for key in report_of(vit).rows if key[1] == "checkpoint"]
    assert [key[:3] for key in coded] == [("blocks.1", "checkpoint", "input")]


def test_outermost(vit):
    names = [name for name, _ in vit.named_modules()]
    policy = Policy(checkpoint=["blocks.*", "blocks.1"])
    assert policy.checkpointed(names) == {"blocks.0", "blocks.1", "blocks.2"}
    assert Policy(checkpoint=["", "blocks.*"]).checkpointed(names) == {""}
    assert Policy().checkpointed(names) == set()


def test_the_whole_model(vit, images):
    mesa_train.wrap(vit)
    expected = gradients(vit, images)
    mesa_train.wrap(vit, Policy(checkpoint=[""]))
    assert all(map(torch.equal, gradients(vit, images), expected))


def test_dropout_draws_the_same_masks():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    x = torch.randn(32, 64)
    torch.manual_seed(2)
    before = gradients(model, x)
    torch.manual_seed(2)
    policy = Policy(checkpoint=["1", "2"], overrides={"*": {"enabled": False}})
    assert all(map(torch.equal, gradients(mesa_train.wrap(model, policy), x), before))


def test_inside_a_checkpoint_of_the_users(vit, images):
    mesa_train.wrap(vit, Policy(checkpoint=["blocks.*.mlp"]))
    expected = gradients(vit, images)
    vit.set_grad_checkpointing()
    assert all(map(torch.equal, gradients(vit, images), expected))


@pytest.mark.slow
def test_compiled(vit, images):
    mesa_train.wrap(vit, Policy(checkpoint=["blocks.*"]))
    expected = gradients(vit, images)
    compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
    for own, other in zip(gradients(compiled, images), expected, strict=True):
        assert (own - other).norm() <= 1e-4 * other.norm() + 1e-7  # float32 sums in another order


def test_yaml():
    policy = Policy(checkpoint=["blocks.*"], checkpoint_inputs=8)
    assert Policy.from_yaml(policy.to_yaml()) == policy
    assert policy.checkpoint == ("blocks.*",)


def test_bad_input(vit):
    with pytest.raises(TypeError, match=r"Policy.checkpoint must list names .* got 'blocks'"):
        Policy(checkpoint="blocks")
    with pytest.raises(ValueError, match="'block' matches no module; close names: blocks"):
        mesa_train.wrap(vit, Policy(checkpoint=["block"]))
    with pytest.raises(ValueError, match="unknown field 'checkpoint'"):
        Policy(overrides={"blocks.*": {"checkpoint": True}})
