"""What stands around a wrapped model: contexts, threads, transforms, patched and traced forwards."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from wrap_helpers import (
    EIGHT,
    LOSSLESS,
    Checkpointed,
    batch,
    close,
    gradients,
    images,
    net,
    same,
    saved_bytes,
)

import mesa_train
from mesa_train import Policy, compress
from mesa_train.engine.wrap import report_of


def test_compress_around_functions():
    x = torch.randn(32, 64).requires_grad_()
    size, output = saved_bytes(lambda: F.gelu(x.mul(1.0)))
    assert size == 32 * 64 * 4

    def compressed():
        with compress(EIGHT):
            return F.gelu(x.mul(1.0))

    size, output = saved_bytes(compressed)
    assert size == 32 * (64 + 4)
    output.sum().backward()
    assert not _get_current_function_mode_stack()


def test_two_threads():
    model = mesa_train.wrap(Checkpointed(None), Policy(min_bytes=0, recompute="linear"))
    other = copy.deepcopy(model)
    expected = [gradients(model, images(seed)) for seed in (1, 2)]
    found, errors = {}, []

    def run(which, m, seed):
        try:
            for _ in range(5):
                found[which] = gradients(m, images(seed))
        except BaseException as error:  # handed to the test below
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(i, m, i + 1)) for i, m in enumerate((model, other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert same(found[0], expected[0])
    assert same(found[1], expected[1])


def test_transforms_pass_through():
    from torch.func import functional_call, grad, jvp, vmap

    torch.manual_seed(0)
    plain = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    model = mesa_train.wrap(copy.deepcopy(plain), EIGHT)
    parameters = {n: p.detach() for n, p in plain.named_parameters()}
    x = torch.randn(6, 8)

    def loss(module):
        return lambda p, x: functional_call(module, p, (x,)).square().sum()

    for found, expected in [
        (grad(loss(model))(parameters, x), grad(loss(plain))(parameters, x)),
        (
            vmap(grad(loss(model)), in_dims=(None, 0))(parameters, x),
            vmap(grad(loss(plain)), in_dims=(None, 0))(parameters, x),
        ),
    ]:
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert torch.equal(vmap(model)(x), vmap(plain)(x))
    found, expected = [jvp(m, (x,), (torch.ones_like(x),)) for m in (model, plain)]
    assert torch.equal(found[1], expected[1])


def test_forward_patched_on_the_instance():
    model = net()
    original = model[0].forward
    model[0].forward = lambda x: original(x) * 2
    plain = gradients(model, batch())
    mesa_train.wrap(model, LOSSLESS)
    assert close(gradients(model, batch()), plain, 1e-5)
    mesa_train.unwrap(model)
    assert same(gradients(model, batch()), plain)


def test_parametrized_and_normed_weights():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(32, 16)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8)),
    ).eval()
    classes = [type(m) for m in model.modules()]
    plain = gradients(model, batch())
    mesa_train.wrap(model, LOSSLESS)
    assert close(gradients(model, batch()), plain, 1e-5)
    mesa_train.unwrap(model)
    assert [type(m) for m in model.modules()] == classes


def test_traced_by_fx():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8))
    model = torch.fx.symbolic_trace(copy.deepcopy(plain))
    mesa_train.wrap(model, EIGHT)
    assert close(gradients(model, batch()), gradients(plain, batch()), 0.02)
    copied = copy.deepcopy(model)
    assert close(gradients(copied, batch()), gradients(plain, batch()), 0.02)
    mesa_train.unwrap(model)
    assert same(gradients(model, batch()), gradients(plain, batch()))


def test_an_inner_context_decides_alone() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    weight = nn.Parameter(torch.randn(8, 8))

    def node() -> str:
        return type(nn.functional.linear(x, weight).grad_fn).__name__

    with mesa_train.compress(mesa_train.Policy(min_bytes=0)) as context:
        with mesa_train.compress(mesa_train.Policy(enabled=False)):
            assert node() != "LinearBackward"
        assert node() == "LinearBackward"
        with context:
            assert node() == "LinearBackward"
        assert node() == "LinearBackward"


@pytest.mark.parametrize("around", ["torch.compile", "DataParallel", "checkpoint wrapper"])
def test_patterns_name_modules_of_the_model_itself(around):
    """Whoever wrapped it before: patterns and reports use the names without the wrappers'."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = net()
    if around == "checkpoint wrapper":
        model[0] = checkpoint_wrapper(model[0])
    wrapper = {"torch.compile": torch.compile, "DataParallel": nn.DataParallel}
    outer = wrapper.get(around, lambda m: m)(model)
    policy = Policy(min_bytes=0, overrides={"0.mlp.0": {"enabled": False}})
    mesa_train.wrap(outer, policy)
    gradients(model, batch())
    names = {name for name, *_ in report_of(outer).rows}
    assert {"0.norm", "1.mlp.0"} <= names
    assert not any("module" in name or "_" in name for name in names)
    assert "0.mlp.0" not in names  # switched off
    with pytest.raises(ValueError, match="matches no module"):
        mesa_train.wrap(outer, Policy(overrides={"module.0": {"bits": 4}}))
