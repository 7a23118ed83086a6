"""`wrap` changes what is kept and nothing else; `unwrap` gives back what came in."""

import copy
import inspect

import pytest
import torch
from torch import nn
from wrap_helpers import EIGHT, LOSSLESS, Block, batch, close, gradients, net, same, saved_bytes

import mesa_train
from mesa_train import PRESETS, Policy, compress
from mesa_train.engine.wrap import policy_of, report_of


def test_parameters_keys_and_values_are_the_same():
    model = net()
    parameters, state = (
        dict(model.named_parameters()),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    wrapped = mesa_train.wrap(model)
    assert wrapped is model
    assert list(wrapped.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in wrapped.state_dict().items())
    assert all(p is parameters[n] for n, p in wrapped.named_parameters())
    net().load_state_dict(wrapped.state_dict())
    wrapped.load_state_dict(net().state_dict())


def test_signature_type_and_names_are_the_same():
    plain = Block()
    model = mesa_train.wrap(Block())
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.forward.__doc__ == plain.forward.__doc__
    assert isinstance(model, Block)
    assert type(model).__name__ == "Block"
    assert type(model).__qualname__ == "Block"
    assert type(model).__module__ == Block.__module__
    assert type(model).__doc__ == Block.__doc__
    assert repr(model) == repr(plain)
    assert model.double_width == 64
    assert set(dict(model.named_modules())) == set(dict(plain.named_modules()))


def test_the_forward_is_exact_and_the_gradient_close():
    model = net()
    x = batch()
    expected, plain = model(x), gradients(model, x)
    mesa_train.wrap(model, EIGHT)
    assert torch.equal(model(x), expected)
    found = gradients(model, x)
    assert not same(found, plain)
    assert close(found, plain, 0.02)


def test_train_and_eval_mean_what_they_meant():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    plain = copy.deepcopy(model)
    mesa_train.wrap(model, EIGHT)
    x = torch.randn(6, 8)
    for training in (True, False, True):
        model.train(training)
        plain.train(training)
        torch.manual_seed(0)
        expected = plain(x)
        torch.manual_seed(0)
        assert torch.equal(model(x), expected)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(guard):
    model = mesa_train.wrap(net(), EIGHT)
    with guard():
        size, output = saved_bytes(lambda: model(batch()))
    assert size == 0
    assert not output.requires_grad
    assert report_of(model).rows == {}
    model.requires_grad_(False)
    assert saved_bytes(lambda: model(batch()))[0] == 0


def test_module_parameters_may_change_dtype():
    model = mesa_train.wrap(net(), EIGHT).double()
    gradients(model, batch().double())
    model.to(torch.bfloat16)
    assert all(g.dtype is torch.bfloat16 for g in gradients(model, batch().bfloat16()))


def everything(model):
    """What a module is made of, hooks included."""
    return [
        (type(m), set(m.__dict__), list(m._buffers), set(m._non_persistent_buffers_set))
        for m in model.modules()
    ]


@pytest.mark.parametrize("policy", PRESETS)
def test_unwrap_restores_exactly_what_came_in(policy):
    model = net()
    before, plain = everything(model), gradients(model, batch())
    mesa_train.wrap(model, policy)
    gradients(model, batch())
    assert mesa_train.unwrap(model) is model
    assert everything(model) == before
    assert same(gradients(model, batch()), plain)
    assert policy_of(model) is None


def test_unwrapping_what_is_not_wrapped_does_nothing():
    model = net()
    before = everything(model)
    assert everything(mesa_train.unwrap(model)) == before


def test_wrapping_twice_replaces_the_policy():
    model = net()
    mesa_train.wrap(model, "mesa4")
    once = everything(model)
    mesa_train.wrap(model, EIGHT)
    assert policy_of(model) == EIGHT
    assert everything(model) == once
    eight = gradients(model, batch())
    assert same(eight, gradients(mesa_train.wrap(net(), EIGHT), batch()))
    mesa_train.unwrap(model)
    assert type(model[0]) is Block


def test_a_submodule_first_then_the_model():
    model = net()
    mesa_train.wrap(model[0], "mesa4")
    mesa_train.wrap(model, EIGHT)
    assert policy_of(model[0]) == EIGHT
    assert same(gradients(model, batch()), gradients(mesa_train.wrap(net(), EIGHT), batch()))
    mesa_train.unwrap(model)
    assert type(model[0]) is Block


def test_the_model_first_then_a_submodule():
    size_all, _ = saved_bytes(lambda: mesa_train.wrap(net(), EIGHT)(batch()))
    model = mesa_train.wrap(net(), EIGHT)
    mesa_train.wrap(model[0], LOSSLESS)
    assert policy_of(model[0]) == LOSSLESS
    assert policy_of(model[1]) == EIGHT
    size, _ = saved_bytes(lambda: model(batch()))
    assert size > size_all


def test_unwrapping_a_submodule_leaves_the_rest_wrapped():
    model = mesa_train.wrap(net(), EIGHT)
    mesa_train.unwrap(model[1])
    assert type(model[1]) is Block
    assert policy_of(model) == EIGHT
    assert close(gradients(model, batch()), gradients(net(), batch()), 0.02)


@pytest.mark.parametrize(
    "outer", [EIGHT, LOSSLESS, Policy(enabled=False)], ids=["eight", "lossless", "off"]
)
@pytest.mark.parametrize(
    "inner", [EIGHT, LOSSLESS, Policy(enabled=False)], ids=["eight", "lossless", "off"]
)
@pytest.mark.parametrize("by", ["wrap", "compress"])
def test_the_inner_policy_holds_inside(outer, inner, by):
    """Of a wrapped module in another's forward: its bytes are those it has on its own."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x):
            return (self.linear(x.exp()) * x.sin()).softmax(-1)

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    torch.manual_seed(0)
    x = torch.randn(16, 32).requires_grad_().mul(1.0)
    alone = mesa_train.wrap(Inner(), inner)
    expected, _ = saved_bytes(lambda: alone(x))
    model = Outer(Inner())
    if by == "wrap":
        mesa_train.wrap(model, outer)
        mesa_train.wrap(model.inner, inner)
        found, output = saved_bytes(lambda: model(x))
    else:
        mesa_train.wrap(model.inner, inner)
        with compress(outer):
            found, output = saved_bytes(lambda: model(x))
    assert found == expected
    output.sum().backward()


def test_shared_modules_and_weights():
    torch.manual_seed(0)
    block = Block()
    model = nn.Sequential(block, block, nn.Linear(32, 32))
    model[2].weight = nn.Parameter(torch.randn(32, 32))
    tied = nn.Linear(32, 32)
    tied.weight = model[2].weight
    model.append(tied)
    plain = gradients(model, batch())
    mesa_train.wrap(model, LOSSLESS)
    assert model[0] is model[1]
    assert model[2].weight is model[3].weight
    assert close(gradients(model, batch()), plain, 1e-5)
    mesa_train.unwrap(model)
    assert type(model[0]) is Block


def test_the_report_names_the_module_of_a_relu_and_counts_its_bits():
    model = mesa_train.wrap(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), "mesa8")
    model(torch.randn(64, 16))
    assert report_of(model).rows["1", "activation", "input", "1 bit"] == (1, 64 * 16 // 8)


def test_a_small_input_is_kept_in_the_dtype_of_autocast():
    x, model = torch.randn(3, 4), nn.Linear(4, 4)
    plain = copy.deepcopy(model)
    mesa_train.wrap(model, "mesa8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(gradients(model, x), gradients(plain, x))
    assert [size for _, size in report_of(model).rows.values()] == [2 * x.numel()]
