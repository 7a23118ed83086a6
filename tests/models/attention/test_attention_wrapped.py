"""The attention layers under mesa_train: plain's outputs, and plain's gradients if nothing is coded."""

import pytest
import torch

import mesa_train
from mesa_train.models.attention import ATTENTION_LAYERS, create_attention

# Gradients differ by the order of sums where a lossless stash is rebuilt or a Linear is flattened.
BOUNDS = {"lossless": 1e-6, "mesa8": 1e-2}


def step(layer, maps, probe, autocast):
    """(output, all gradients as one vector)."""
    x = maps.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    (out.float() * probe).sum().backward()
    grads = [x.grad, *[p.grad for p in layer.parameters()]]
    return out.detach(), torch.cat([g.flatten() for g in grads]).double()


@pytest.mark.parametrize("name", ATTENTION_LAYERS)
def test_outputs_are_plains_and_gradients_within_the_codecs_error(name):
    torch.manual_seed(0)
    layer = create_attention(name, 48, 6, 14, 14)
    maps, probe = torch.randn(2, 2, 14, 14, 48)
    out, grads = step(layer, maps, probe, autocast=False)
    assert grads.isfinite().all()
    for policy, bound in BOUNDS.items():
        mesa_train.wrap(layer, policy)
        wrapped_out, wrapped_grads = step(layer, maps, probe, autocast=False)
        mesa_train.unwrap(layer)
        assert torch.equal(wrapped_out, out), policy
        error = (wrapped_grads - grads).norm() / grads.norm()
        assert error <= bound, (policy, error)


@pytest.mark.parametrize("name", ATTENTION_LAYERS)
def test_bf16_autocast(name):
    torch.manual_seed(0)
    layer = create_attention(name, 12, 6, 14, 14) if name != "hornet" else create_attention(
        name, 16, 2, 14, 14
    )  # fmt: skip
    maps, probe = torch.randn(2, 1, 14, 14, layer.dim)
    out, grads = step(layer, maps, probe, autocast=True)
    mesa_train.wrap(layer, "mesa8")
    wrapped_out, wrapped_grads = step(layer, maps, probe, autocast=True)
    assert torch.equal(wrapped_out, out)
    assert (wrapped_grads - grads).norm() <= 3e-2 * grads.norm()


@pytest.mark.parametrize("name", ATTENTION_LAYERS)
def test_fewer_bytes_are_saved(name):
    with torch.device("meta"):
        layer = create_attention(name, 192, 6, 14, 14)
        x = torch.empty(8, 14, 14, 192, requires_grad=True)
    plain, coded = (
        mesa_train.footprint(layer, x, policy=policy).saved_bytes for policy in ("plain", "mesa8")
    )
    # mesa8 saves exp's outputs, of which Performer's are 40 %, exactly.
    assert plain >= (1.6 if name == "performer" else 2) * coded
