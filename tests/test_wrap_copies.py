"""Copies, pickles and hooks of a wrapped model are those of the model."""

import copy
import io
import pickle

import pytest
import torch
from wrapped import EIGHT, LOSSLESS, Block, batch, close, gradients, net, same

import mesa_train
from mesa_train import PRESETS
from mesa_train.wrap import policy_of


def test_deepcopy_keeps_the_policy_and_is_independent():
    model = mesa_train.wrap(net(), "mesa4")
    model(batch())
    other = copy.deepcopy(model)
    assert policy_of(other) == PRESETS["mesa4"]
    assert type(other[0]) is type(model[0])
    assert same(gradients(other, batch()), gradients(model, batch()))
    mesa_train.wrap(other, EIGHT)
    assert policy_of(model) == PRESETS["mesa4"]
    mesa_train.unwrap(model)
    assert policy_of(other) == EIGHT
    with torch.no_grad():
        other[0].offset.add_(1)
    assert torch.equal(model[0].offset, torch.ones(32))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol):
    model = mesa_train.wrap(net(), EIGHT)
    expected = gradients(model, batch())
    other = pickle.loads(pickle.dumps(model, protocol))
    assert policy_of(other) == EIGHT
    assert isinstance(other[0], Block)
    assert same(gradients(other, batch()), expected)
    mesa_train.unwrap(other)
    assert type(other[0]) is Block


@pytest.mark.parametrize("policy", ["mesa8", "paper"])
def test_torch_save(policy):
    model = mesa_train.wrap(net(), policy)
    model(batch())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert policy_of(other) == PRESETS[policy]
    assert same(gradients(other, batch()), gradients(model, batch()))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    net().load_state_dict(torch.load(file, weights_only=True))


def test_hooks_survive():
    model = net()
    seen = []

    def note(name):
        def hook(*args):
            seen.append(name)

        return hook

    model[0].register_forward_pre_hook(note("pre"))
    model[0].register_forward_hook(note("forward"))
    model[0].register_full_backward_hook(note("backward"))
    model[0].mlp[0].register_full_backward_pre_hook(note("backward pre"))
    model.register_state_dict_pre_hook(note("state"))
    model.register_load_state_dict_post_hook(note("load"))

    def run():
        seen.clear()
        gradients(model, batch().requires_grad_())
        model.load_state_dict(model.state_dict())
        return list(seen)

    expected = run()
    assert set(expected) == {"pre", "forward", "backward", "backward pre", "state", "load"}
    mesa_train.wrap(model, EIGHT)
    assert run() == expected
    model[1].register_forward_hook(note("later"))
    assert "later" in run()
    mesa_train.unwrap(model)
    assert run() == [
        *expected[: expected.index("forward") + 1],
        "later",
        *expected[expected.index("forward") + 1 :],
    ]


def test_a_hook_that_replaces_an_output_is_obeyed():
    model = net()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[0].mlp[1].register_forward_hook(lambda module, args, output: output + 1)
    plain = gradients(model, batch())
    assert close(gradients(mesa_train.wrap(model, LOSSLESS), batch()), plain, 1e-5)
