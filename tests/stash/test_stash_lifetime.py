"""What outlives what: codes go with the graph, and nothing is left behind."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from stash_helpers import COLS, ROWS, activation
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import mesa_train
from mesa_train import Policy, compress
from mesa_train.stash import stash


def test_codes_go_with_the_graph():
    linear = nn.Linear(COLS, COLS)
    references = []

    def pack(tensor):
        references.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), compress(Policy(min_bytes=0)):
        output = F.gelu(linear(activation(ROWS, COLS)))
    output.sum().backward()
    del output
    alive = [r() for r in references if r() is not None]
    assert all(isinstance(t, nn.Parameter) for t in alive)


class Interrupted(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.first, self.last = nn.Linear(COLS, COLS), nn.Linear(COLS, COLS)
        self.error = error

    def forward(self, x):
        x = F.gelu(self.first(x))
        if self.error is not None:
            raise self.error
        return self.last(x)


@pytest.mark.parametrize(
    "error", [ValueError("stop"), KeyboardInterrupt()], ids=["exception", "interrupt"]
)
def test_an_exception_in_the_middle_leaves_nothing_behind(error):
    torch.manual_seed(0)
    model = mesa_train.wrap(Interrupted(None), Policy(min_bytes=0))
    x = torch.randn(ROWS, COLS)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.error = error
    references = []

    def pack(tensor):
        if tensor.dtype is torch.uint8:
            references.append(weakref.ref(tensor))
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        pytest.raises(type(error)) as raised,
    ):
        model(x)
    assert references
    assert not _get_current_function_mode_stack()
    error.__traceback__ = None
    del raised
    gc.collect()
    assert all(r() is None for r in references)
    model.error = None
    model(x).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_repeated_matmuls_are_shared_in_one_backward_and_then_gone(monkeypatch):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.LayerNorm(COLS), nn.Linear(COLS, COLS), nn.GELU(), nn.Linear(COLS, COLS))
    calls = []

    take = type(stash.backward_cache).take

    def counted(self, *args):
        value = take(self, *args)
        calls.append(value is not None)
        return value

    monkeypatch.setattr(type(stash.backward_cache), "take", counted)
    with compress(Policy(min_bytes=0, recompute="linear")):
        output = mlp(activation(ROWS, COLS))
    output.sum().backward()
    assert calls == [False, True]
    assert not stash.backward_cache.values


def test_a_repeated_matmul_goes_with_its_last_user_where_a_layer_scale_replaced_one():
    mlp = nn.Sequential(nn.LayerNorm(COLS), nn.Linear(COLS, COLS), nn.GELU(), nn.Linear(COLS, COLS))
    scale = nn.Parameter(torch.ones(COLS))
    left = []
    x = activation(ROWS, COLS)
    x.register_hook(lambda _: left.append(len(stash.backward_cache.values)))
    with compress(Policy(min_bytes=0, recompute="linear")):
        output = mlp(x) * scale
    output.sum().backward()
    assert left == [0]


def test_a_failed_backward_leaves_no_rebuilt_matmul_for_good():
    mlp = nn.Sequential(nn.LayerNorm(COLS), nn.Linear(COLS, COLS), nn.GELU(), nn.Linear(COLS, COLS))

    def step(fail):
        with compress(Policy(min_bytes=0, recompute="linear")):
            h = mlp[1](mlp[0](activation(ROWS, COLS)))
            u = mlp[2](h)
            output = mlp[3](u)
        if fail:
            u.register_hook(lambda _: 1 / 0)
        output.sum().backward()

    with pytest.raises(ZeroDivisionError):
        step(True)
    step(False)
    assert not stash.backward_cache.values


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with compress(Policy(bits=4, min_bytes=0, rounding="stochastic")):
        x = torch.ones(ROWS, COLS).requires_grad_() * 0.3
        F.linear(
            F.layer_norm(x.exp(), (COLS,)), torch.ones(8, COLS, requires_grad=True)
        ).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("inputs", [None, 8])
@pytest.mark.parametrize("function", [torch.exp, torch.exp2, torch.sqrt])
def test_an_output_that_its_own_node_keeps_does_not_hold_the_graph(function, dtype, inputs):
    """All keep their output: exp in its row, exp2 under the coding hooks, sqrt without, also beside those of
    checkpoints' inputs."""
    policy = Policy(overrides={"fallback.exp2": {}}, checkpoint_inputs=inputs)
    gc.disable()
    try:
        leaf = torch.randn(8, 8, dtype=dtype, requires_grad=True)
        with compress(policy):
            output = function(leaf)
        reference = weakref.ref(output)
        del output
        assert reference() is None
    finally:
        gc.enable()
