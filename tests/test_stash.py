"""What is kept, byte by byte, and that a lineage is used only while it is true."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import mesa_train
from mesa_train import Policy, compress, stash
from mesa_train.codecs.affine import Affine

ROWS, COLS = 64, 96
LOSSLESS = Policy(bits=32, min_bytes=0)


class Kept:
    """Counts the storages that the graph keeps, each once, parameters apart."""

    def __init__(self, *parameters):
        self.known = {p.untyped_storage()._cdata for p in parameters}
        self.storages = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self):
        return sum(s.nbytes() for s in self.storages.values())


def codes(rows, cols, bits=8):
    return Affine(bits, 128).bytes(rows, cols)


def activation(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_().mul(1.0)


def kept(function, *arguments, parameters=(), policy=None):
    with Kept(*parameters) as counter, compress(policy or Policy(min_bytes=0)):
        output = function(*arguments)
    return counter.bytes, output


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_linear_keeps_codes_of_its_input(bits):
    linear = nn.Linear(COLS, 32)
    policy = Policy(bits=bits, min_bytes=0)
    assert kept(linear, activation(ROWS, COLS), parameters=linear.parameters(), policy=policy)[
        0
    ] == codes(ROWS, COLS, bits)


def test_frozen_weight_keeps_no_input_and_frozen_input_no_weight():
    linear = nn.Linear(COLS, 32)
    linear.weight.requires_grad_(False)
    assert kept(linear, activation(ROWS, COLS), parameters=linear.parameters())[0] == 0
    computed = torch.randn(32, COLS).requires_grad_() * 2
    size, _ = kept(lambda x: F.linear(x, computed), torch.randn(ROWS, COLS))
    assert size == codes(ROWS, COLS)
    a, b = activation(ROWS, COLS), torch.randn(COLS, 32)
    assert kept(torch.mm, a, b)[0] == codes(COLS, 32)
    assert kept(torch.mm, torch.randn(ROWS, COLS), activation(COLS, 32))[0] == codes(ROWS, COLS)


def test_mlp_keeps_x_hat_its_statistics_and_the_activation_input():
    mlp = nn.Sequential(
        nn.LayerNorm(COLS), nn.Linear(COLS, 2 * COLS), nn.GELU(), nn.Linear(2 * COLS, COLS)
    )
    size, _ = kept(mlp, activation(ROWS, COLS), parameters=mlp.parameters())
    assert size == codes(ROWS, COLS) + ROWS * 4 + codes(ROWS, 2 * COLS)


def test_mlp_under_recompute_linear_keeps_x_hat_alone():
    mlp = nn.Sequential(
        nn.LayerNorm(COLS), nn.Linear(COLS, 2 * COLS), nn.GELU(), nn.Linear(2 * COLS, COLS)
    )
    policy = Policy(min_bytes=0, recompute="linear")
    size, _ = kept(mlp, activation(ROWS, COLS), parameters=mlp.parameters(), policy=policy)
    assert size == codes(ROWS, COLS) + ROWS * 4


def test_mlp_under_recompute_none_keeps_every_operand():
    mlp = nn.Sequential(
        nn.LayerNorm(COLS), nn.Linear(COLS, 2 * COLS), nn.GELU(), nn.Linear(2 * COLS, COLS)
    )
    policy = Policy(min_bytes=0, recompute="none")
    size, _ = kept(mlp, activation(ROWS, COLS), parameters=mlp.parameters(), policy=policy)
    assert size == 2 * codes(ROWS, COLS) + ROWS * 4 + 2 * codes(ROWS, 2 * COLS)


def test_q_k_v_share_their_input_and_the_projection_the_attention_output():
    query, key, value, projection = [nn.Linear(COLS, COLS) for _ in range(4)]
    heads, tokens, batch = 3, 16, 4

    def attention(x):
        q, k, v = [
            f(x).view(batch, tokens, heads, COLS // heads).transpose(1, 2)
            for f in (query, key, value)
        ]
        out = F.scaled_dot_product_attention(q, k, v)
        return projection(out.transpose(1, 2).reshape(batch, tokens, COLS))

    parameters = [p for f in (query, key, value, projection) for p in f.parameters()]
    size, _ = kept(attention, activation(batch, tokens, COLS), parameters=parameters)
    logsumexp = batch * heads * tokens * 4
    # x once for three Linears; q, k, v and the output as (batch, tokens, COLS) in memory, so groups span the heads.
    assert size == (1 + 3 + 1) * codes(batch * tokens, COLS) + logsumexp
    policy = Policy(min_bytes=0, recompute="linear")
    size, _ = kept(attention, activation(batch, tokens, COLS), parameters=parameters, policy=policy)
    assert size == (1 + 1) * codes(batch * tokens, COLS) + logsumexp


def test_one_matmul_behind_attention_and_an_activation_keeps_nothing_of_its_own():
    projection = nn.Linear(3 * COLS, COLS)
    heads, tokens, batch = 3, 16, 4

    def block(q, k, v, h):
        out = F.scaled_dot_product_attention(*[t.transpose(1, 2) for t in (q, k, v)])
        return projection(torch.cat([out.transpose(1, 2).flatten(2), F.gelu(h)], -1))

    parts = [activation(batch, tokens, heads, COLS // heads) for _ in range(3)]
    arguments = (*parts, activation(batch, tokens, 2 * COLS))
    size, _ = kept(block, *arguments, parameters=projection.parameters())
    rows, logsumexp = batch * tokens, batch * heads * tokens * 4
    assert size == 4 * codes(rows, COLS) + codes(rows, 2 * COLS) + logsumexp


def test_parts_without_a_stash_that_are_the_larger_share_are_coded_with_the_rest():
    projection = nn.Linear(3 * COLS, COLS)
    size, _ = kept(
        lambda x, y: projection(torch.cat([F.gelu(x), y], -1)),
        activation(ROWS, COLS),
        activation(ROWS, 2 * COLS),
        parameters=projection.parameters(),
    )
    assert size == codes(ROWS, COLS) + codes(ROWS, 3 * COLS)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_of_a_repeated_matmul_keeps_its_deviations_alone(norm):
    project, normalise = nn.Linear(COLS, 2 * COLS), norm(COLS)

    def head(x):
        q, k = project(x).split(COLS, -1)
        return normalise(q) * normalise(k)

    parameters = [*project.parameters(), *normalise.parameters()]
    policy = Policy(min_bytes=0, recompute="linear")
    size, output = kept(head, activation(ROWS, COLS), parameters=parameters, policy=policy)
    assert size == codes(ROWS, COLS) + 2 * ROWS * 4
    output.sum().backward()
    assert not stash.neighbours.values


def test_softmax_and_the_matmul_behind_it_share():
    size, _ = kept(lambda x, y: x.softmax(-1) @ y, activation(4, 16, 16), activation(4, 16, 24))
    assert size == codes(64, 16) + codes(64, 24)


def test_layer_scale_keeps_nothing_more():
    linear, scale = nn.Linear(COLS, COLS), nn.Parameter(torch.ones(COLS))
    parameters = [*linear.parameters(), scale]
    for function in (
        lambda x: linear(x) * scale,
        lambda x: scale * linear(x),
        lambda x: linear(x).mul_(scale),
    ):
        # `mul_` copies back, which keeps nothing either.
        assert kept(function, activation(ROWS, COLS), parameters=parameters)[0] == codes(ROWS, COLS)


def test_masks_are_one_bit():
    assert kept(F.relu, activation(ROWS, COLS))[0] == ROWS * COLS // 8
    assert kept(F.dropout, activation(ROWS, COLS))[0] == ROWS * COLS // 8
    size, _ = kept(
        lambda x: F.linear(F.dropout(F.gelu(x)), weight),
        activation(ROWS, COLS),
        parameters=[weight := nn.Parameter(torch.randn(8, COLS))],
    )
    assert size == codes(ROWS, COLS) + ROWS * COLS // 8


def test_swiglu_keeps_its_two_inputs():
    weight = nn.Parameter(torch.randn(8, COLS))
    size, _ = kept(
        lambda a, b: F.linear(F.silu(a) * b, weight),
        activation(ROWS, COLS),
        activation(ROWS, COLS),
        parameters=[weight],
    )
    assert size == 2 * codes(ROWS, COLS)


def test_autocast_keeps_no_copy_of_a_weight():
    linear = nn.Linear(COLS, COLS)
    with torch.autocast("cpu", torch.bfloat16):
        size, _ = kept(linear, activation(ROWS, COLS), parameters=linear.parameters())
    assert size == codes(ROWS, COLS)


def test_fallback_codes_what_pytorch_saves():
    assert kept(torch.exp, activation(ROWS, COLS).mul(0.5))[0] == codes(ROWS, COLS)
    assert kept(torch.sin, activation(ROWS, COLS))[0] == codes(ROWS, COLS)
    assert kept(lambda x: F.pad(x, (1, 1), mode="reflect"), activation(4, ROWS, COLS))[0] == codes(
        4 * ROWS, COLS
    )


def test_norm_of_a_matrix_codes_along_the_channels():
    norm = nn.BatchNorm1d(COLS)
    size, _ = kept(norm, activation(ROWS, COLS), parameters=[*norm.parameters(), *norm.buffers()])
    assert size == codes(ROWS, COLS) + COLS * 4


def test_min_bytes_keeps_small_tensors_as_they_are():
    linear = nn.Linear(COLS, 8)
    for rows in (16, 17):
        policy = Policy(min_bytes=17 * COLS * 4)
        size, _ = kept(
            linear, activation(rows, COLS), parameters=linear.parameters(), policy=policy
        )
        assert size == (codes(rows, COLS) if rows == 17 else rows * COLS * 4)


# --- lineage ---


def both(function, *shapes, policy=LOSSLESS, dtype=torch.float64):
    """(gradients in plain PyTorch, gradients under the policy) with respect to leaves of these shapes."""
    results = []
    for active in (False, True):
        torch.manual_seed(0)
        leaves = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
        if active:
            with compress(policy):
                output = function(*leaves)
        else:
            output = function(*leaves)
        results.append(torch.autograd.grad(output.square().sum(), leaves))
    return results


def equal(plain, ours, bound=1e-10):
    for p, o in zip(plain, ours, strict=True):
        assert (p - o).norm() <= bound * p.norm()


def overwritten(write):
    """gelu's output is rebuilt from gelu's input; after a write that would be another tensor's gradient."""

    def function(x, w):
        h = F.gelu(x.mul(1.0))
        write(h)
        return F.linear(h, w)

    return function


WRITES = {
    "add_": lambda h: h.add_(3.0),
    "+=": lambda h: h.__iadd__(3.0),
    "copy_": lambda h: h.copy_(torch.ones_like(h)),
    "setitem": lambda h: h.__setitem__((slice(None), 0), 5.0),
    "a view of it": lambda h: h.view(-1)[3:20].mul_(4.0),
    "no_grad": lambda h: h.detach().add_(3.0),
    "out=": lambda h: torch.add(h.detach(), 2.0, out=h.detach()),
    "mul_": lambda h: h.mul_(2.0),
    "clamp_": lambda h: h.clamp_(min=0.1),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_stale_lineage_is_never_used(write):
    equal(*both(overwritten(WRITES[write]), (5, 8), (3, 8)))


@pytest.mark.parametrize("write", WRITES)
def test_a_stale_view_is_never_used(write):
    def function(x, w):
        h = F.gelu(x.mul(1.0))
        part = h.transpose(0, 1)
        WRITES[write](h)
        return F.linear(part.transpose(0, 1), w)

    equal(*both(function, (5, 8), (3, 8)))


def test_a_stale_product_is_never_scaled():
    def function(x, w, s):
        h = x.mul(1.0)
        y = F.linear(h, w)
        y += 1
        return y * s

    equal(*both(function, (5, 8), (3, 8), (3,)))


def test_the_input_of_a_scaled_linear_may_be_written_to():
    """With codes the backward does not need the tensor, but its gradient must still go where the Linear took it."""
    plain, _ = both(lambda x, w, s: F.linear(x.mul(1.0), w) * s, (5, 8), (3, 8), (3,))

    def function(x, w, s):
        h = x.mul(1.0)
        y = F.linear(h, w)
        h.mul_(2)
        return y * s

    torch.manual_seed(0)
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 8), (3, 8), (3,))
    ]
    with compress(Policy(min_bytes=0)):
        output = function(*leaves)
    equal(plain, torch.autograd.grad(output.square().sum(), leaves), 0.02)


def test_writing_to_a_coded_tensor_is_allowed_and_right():
    def function(x, w):
        h = x.mul(1.0)
        y = F.linear(h, w)
        h += 1
        return y + h.sum()

    torch.manual_seed(0)
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        function(x, w).sum().backward()
    expected = torch.autograd.grad((F.linear(x, w) + (x + 1).sum()).sum(), (x, w))
    with compress(Policy(min_bytes=0)):
        output = function(x, w)
    for f, e in zip(torch.autograd.grad(output.sum(), (x, w)), expected, strict=True):
        assert (f - e).norm() < 0.02 * e.norm()


@pytest.mark.parametrize(
    "operator", [torch.exp, torch.sigmoid, torch.sin, F.gelu, lambda x: x.softmax(-1)]
)
@pytest.mark.parametrize("policy", [LOSSLESS, Policy()], ids=["lossless", "small"])
def test_writing_to_a_tensor_kept_whole_is_the_error_that_pytorch_raises(operator, policy):
    x = torch.randn(5, 8).requires_grad_()
    with compress(policy):
        h = x.mul(1.0)
        y = operator(h)
        h.add_(1)
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + h.sum()).backward()


def test_normalize_lets_its_output_be_written_to():
    def function(x, w):
        y = F.normalize(x.mul(1.0), dim=-1)
        y *= 2
        return F.linear(y, w)

    equal(*both(function, (5, 8), (3, 8)))
    equal(*both(function, (5, 8), (3, 8), policy=Policy()))


def test_the_product_keeps_its_own_gradient_when_asked():
    x, w, s = (
        torch.randn(4, 8),
        torch.randn(3, 8, requires_grad=True),
        torch.randn(3, requires_grad=True),
    )
    seen = []
    with compress(LOSSLESS):
        y, z = F.linear(x, w), F.linear(x, w)
        y.retain_grad()
        z.register_hook(lambda g: seen.append(g))
        total = (y * s).sum() + (z * s).sum()
    total.backward()
    expected = s.detach().expand(4, 3)
    assert torch.equal(y.grad, expected)
    assert torch.equal(seen[0], expected)


def test_one_tensor_for_many_layers_is_coded_once():
    layers = nn.ModuleList(nn.Linear(COLS, 8) for _ in range(5))
    size, output = kept(
        lambda x: sum(f(x) for f in layers), activation(ROWS, COLS), parameters=layers.parameters()
    )
    assert size == codes(ROWS, COLS)
    output.sum().backward()
    assert all(torch.equal(f.weight.grad, layers[0].weight.grad) for f in layers)


def test_weight_sharing():
    def function(x, w):
        return F.linear(F.gelu(F.linear(F.gelu(F.linear(x, w)), w)), w.t())

    for recompute in ("none", "cheap", "linear"):
        equal(
            *both(
                function, (5, 8), (8, 8), policy=Policy(bits=32, min_bytes=0, recompute=recompute)
            )
        )


def test_detach_and_no_grad_inside():
    def function(x, w):
        h = F.gelu(x.mul(1.0))
        with torch.no_grad():
            g = F.linear(h, w).sigmoid()
        return F.linear(h, w) * g + F.linear(h.detach(), w)

    equal(*both(function, (5, 8), (3, 8)))


def test_views_that_need_the_layout_they_had():
    def function(x, w):
        h = F.gelu(x.mul(1.0)).to(memory_format=torch.channels_last)
        return F.linear(h.permute(0, 2, 3, 1).view(-1, 8), w)

    equal(*both(function, (2, 8, 3, 5), (4, 8)))

    def normed(x, w):
        h = F.group_norm(x.contiguous(memory_format=torch.channels_last), 2)
        return F.linear(h.permute(0, 2, 3, 1).view(-1, 8), w)

    equal(*both(normed, (2, 8, 3, 5), (4, 8)))


# --- what outlives what ---


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


def test_repeated_matmuls_are_shared_in_one_backward_and_then_gone():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.LayerNorm(COLS), nn.Linear(COLS, COLS), nn.GELU(), nn.Linear(COLS, COLS))
    calls = []

    class Counted(type(stash.neighbours)):
        def take(self, *args):
            found = super().take(*args)
            calls.append(found is not None)
            return found

    counted = Counted()
    before, stash.neighbours = stash.neighbours, counted
    try:
        with compress(Policy(min_bytes=0, recompute="linear")):
            output = mlp(activation(ROWS, COLS))
        output.sum().backward()
    finally:
        stash.neighbours = before
    assert calls == [False, True]
    assert not counted.values


def test_a_repeated_matmul_goes_with_its_last_user_where_a_layer_scale_replaced_one():
    mlp = nn.Sequential(nn.LayerNorm(COLS), nn.Linear(COLS, COLS), nn.GELU(), nn.Linear(COLS, COLS))
    scale = nn.Parameter(torch.ones(COLS))
    left = []
    x = activation(ROWS, COLS)
    x.register_hook(lambda _: left.append(len(stash.neighbours.values)))
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
    assert not stash.neighbours.values


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with compress(Policy(bits=4, min_bytes=0, rounding="stochastic")):
        x = torch.ones(ROWS, COLS).requires_grad_() * 0.3
        F.linear(
            F.layer_norm(x.exp(), (COLS,)), torch.ones(8, COLS, requires_grad=True)
        ).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
