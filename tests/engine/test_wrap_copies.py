"""Copies, pickles and hooks of a wrapped model are those of the model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from wrap_helpers import EIGHT, LOSSLESS, Block, batch, close, gradients, net, same

import mesa_train
from mesa_train import PRESETS
from mesa_train.engine.bound import entry_of
from mesa_train.engine.mirror import mirrors_for
from mesa_train.engine.wrap import policy_of


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


class Switched(nn.Module):
    """One that chooses its forward, as some of timm's do."""

    def __init__(self):
        super().__init__()
        self.linear, self.factor = nn.Linear(32, 32), 2.0
        self.forward = self.forward_train

    def forward(self, x):
        raise AssertionError("not this one")

    def forward_train(self, x, *, shift=0.0):
        return self.linear(x).sin() * self.factor + shift


class Restored(nn.Module):
    """One that says itself how it is pickled."""

    def __init__(self, width=32):
        super().__init__()
        self.linear, self.factor = nn.Linear(width, width), 2.0

    def forward(self, x, *, shift=0.0):
        return self.linear(x).sin() * self.factor + shift

    def __reduce__(self):
        return Restored, (), self.__dict__


def by_cloudpickle(model):
    cloudpickle = pytest.importorskip("cloudpickle")
    return pickle.loads(cloudpickle.dumps(model))


def by_dill(model):
    dill = pytest.importorskip("dill")
    return dill.loads(dill.dumps(model))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_cloudpickle, by_dill],
    ids=["deepcopy", "pickle", "cloudpickle", "dill"],
)
@pytest.mark.parametrize("kind", [Switched, Restored])
def test_a_copy_computes_with_itself(kind, duplicate):
    model = mesa_train.wrap(kind(), EIGHT)
    copied = duplicate(model)
    assert torch.equal(copied(batch(), shift=1.0), model(batch(), shift=1.0))
    assert policy_of(copied) == EIGHT
    assert mirrors_for(copied.forward) is copied
    assert entry_of(copied).installed is not entry_of(model).installed
    copied.factor = 0.0
    assert not copied(batch()).any()
    assert model(batch()).any()
    mesa_train.unwrap(copied)
    assert not copied(batch()).any()
    assert set(vars(copied)) == set(vars(kind()))


@pytest.mark.parametrize("kind", [Switched, Restored])
def test_a_shallow_copy_shares_its_parts_and_is_not_wrapped_itself(kind):
    model = mesa_train.wrap(kind(), EIGHT)
    copied = copy.copy(model)
    assert copied.linear is model.linear
    assert policy_of(copied) is None
    assert policy_of(copied.linear) == EIGHT
    assert torch.equal(copied(batch(), shift=1.0), model(batch(), shift=1.0))
    if kind is Restored:  # the other's own forward is bound to what was copied, wrapped or not
        copied.factor = 0.0
        assert not copied(batch()).any()
    expected = gradients(copied, batch())
    mesa_train.unwrap(model)
    assert close(gradients(copied, batch()), expected, 0.03)
    mesa_train.wrap(copied, EIGHT)
    assert policy_of(copied) == EIGHT
    assert policy_of(model) is None
    gradients(copied, batch())


def test_a_part_of_a_model_is_copied_alone():
    model = mesa_train.wrap(net(), EIGHT)
    part = pickle.loads(pickle.dumps(model[0]))
    assert policy_of(part) == EIGHT
    assert torch.equal(part(batch()), model[0](batch()))
    assert len(pickle.dumps(model[0])) < 0.6 * len(pickle.dumps(model))  # no reference to the whole


@pytest.mark.parametrize("kind", [Block, Restored])
def test_a_replica_of_data_parallel_computes_with_its_own_parameters(kind):
    model = mesa_train.wrap(kind(), EIGHT)
    replica = model._replicate_for_data_parallel()
    # As torch.nn.parallel.replicate fills it in.
    for name, child in model.named_children():
        replica._modules[name] = nn.Identity() if name == "norm" else child
    replica.linear = nn.Linear(32, 32)
    if kind is Restored:
        assert torch.equal(replica(batch()), replica.linear(batch()).sin() * 2)
        again = replica._replicate_for_data_parallel()
        again.factor = 0.0
        assert not again(batch()).any()
    else:
        assert torch.equal(replica(batch()), batch() + model.mlp(batch()) + model.offset)
    assert replica.forward.__self__ is replica
    assert model.forward.__self__ is model
