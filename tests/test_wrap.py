"""`wrap` changes what is kept and nothing else; `unwrap` gives back what came in."""

import copy
import dataclasses
import inspect
import io
import pickle
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import mesa_train
from mesa_train import PRESETS, Policy, compress, stash
from mesa_train.wrap import policy_of, report_of

EIGHT = Policy(min_bytes=0)
LOSSLESS = Policy(bits=32, min_bytes=0)


class Block(nn.Module):
    """One with a signature, attributes and a property."""

    def __init__(self, width=32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.register_buffer("offset", torch.ones(width))
        self.width = width

    def forward(
        self, x: torch.Tensor, *, scale: float = 1.0, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What it does."""
        return x + scale * self.mlp(self.norm(x)) + self.offset

    @property
    def double_width(self):
        return 2 * self.width


def net():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(32, 5))


def batch(rows=16, seed=1):
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(found, expected):
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def close(found, expected, bound):
    assert [f is None for f in found] == [e is None for e in expected]
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    difference = sum((f - e).square().sum() for f, e in pairs)
    return difference.sqrt() <= bound * sum(e.square().sum() for _, e in pairs).sqrt()


def kept_bytes(function):
    """Bytes the graph keeps, each storage once, and what the function returned."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function()
    return sum(s.nbytes() for s in storages.values()), output


# --- a wrapped model is the same model ---


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
        size, output = kept_bytes(lambda: model(batch()))
    assert size == 0
    assert not output.requires_grad
    assert report_of(model).rows == {}
    model.requires_grad_(False)
    assert kept_bytes(lambda: model(batch()))[0] == 0


def test_module_parameters_may_change_dtype():
    model = mesa_train.wrap(net(), EIGHT).double()
    gradients(model, batch().double())
    model.to(torch.bfloat16)
    assert all(g.dtype is torch.bfloat16 for g in gradients(model, batch().bfloat16()))


# --- unwrap ---


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
    size_all, _ = kept_bytes(lambda: mesa_train.wrap(net(), EIGHT)(batch()))
    model = mesa_train.wrap(net(), EIGHT)
    mesa_train.wrap(model[0], LOSSLESS)
    assert policy_of(model[0]) == LOSSLESS
    assert policy_of(model[1]) == EIGHT
    size, _ = kept_bytes(lambda: model(batch()))
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
    expected, _ = kept_bytes(lambda: alone(x))
    model = Outer(Inner())
    if by == "wrap":
        mesa_train.wrap(model, outer)
        mesa_train.wrap(model.inner, inner)
        found, output = kept_bytes(lambda: model(x))
    else:
        mesa_train.wrap(model.inner, inner)
        with compress(outer):
            found, output = kept_bytes(lambda: model(x))
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


# --- copies ---


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


# --- hooks ---


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


# --- checkpoints ---


class Checkpointed(nn.Module):
    """A small ViT of timm with every block in a checkpoint of a kind; `part` of it: blocks, or what is in them."""

    def __init__(self, kind, part="block"):
        super().__init__()
        torch.manual_seed(0)
        self.vit = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=48,
            depth=3,
            num_heads=3,
            num_classes=5,
        )
        self.kind, self.part = kind, part

    def again(self, function, x):
        if self.kind is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.kind == "reentrant")

    def forward(self, images):
        vit = self.vit
        x = vit.patch_embed(images)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
        for block in vit.blocks:
            if self.part == "block":
                x = self.again(block, x)
            elif self.part == "mlp":
                x = x + block.attn(block.norm1(x))
                # The tensor that enters the checkpoint is a norm's output, which outside has a lineage.
                x = x + self.again(block.mlp, block.norm2(x))
            else:
                x = x + self.again(lambda t, block=block: block.attn(block.norm1(t)), x)
                x = x + self.again(
                    lambda t, block=block: (
                        F.gelu(block.mlp.fc1(block.norm2(t))) @ block.mlp.fc2.weight.t()
                    ),
                    x,
                )
        return vit.head(vit.norm(x)[:, 0])


def images(seed=0):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("preset", ["mesa8", "mesa4", "mesa8-recompute", "lossless", "paper"])
def test_checkpoints_of_blocks_give_the_same_gradients_and_keep_less(kind, preset):
    policy = dataclasses.replace(PRESETS[preset], min_bytes=0)
    unchecked = mesa_train.wrap(Checkpointed(None), policy)
    checked = mesa_train.wrap(Checkpointed(kind), policy)
    size, expected = kept_bytes(lambda: unchecked(images()))
    smaller, found = kept_bytes(lambda: checked(images()))
    assert torch.equal(found, expected)
    # A checkpoint keeps a block's input whole, which is more than what "linear" keeps of a block. What a non-reentrant
    # one keeps goes to its own hooks, not to these.
    if policy.recompute != "linear":
        assert smaller < size
    for output, model in ((expected, unchecked), (found, checked)):
        del output
        model.zero_grad()
        model(images()).square().sum().backward()
    for p, q in zip(checked.parameters(), unchecked.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("part", ["mlp", "function"])
@pytest.mark.parametrize("preset", ["mesa8", "mesa8-recompute"])
def test_checkpoints_of_parts_recompute_what_they_recorded(kind, part, preset):
    """Inside a checkpoint nothing may depend on what is known outside: the recompute does not know it."""
    policy = dataclasses.replace(PRESETS[preset], min_bytes=0)
    plain = Checkpointed(None, part)
    checked = mesa_train.wrap(Checkpointed(kind, part), policy)
    expected, found = gradients(plain, images()), gradients(checked, images())
    assert close(found, expected, 0.03)
    lossless = mesa_train.wrap(checked, LOSSLESS)
    assert close(gradients(lossless, images()), expected, 1e-4)


def test_checkpoints_under_compress():
    plain, model = Checkpointed(None), Checkpointed("non-reentrant")
    expected = gradients(plain, images())
    model.zero_grad()
    with compress(EIGHT):
        output = model(images())
    output.square().sum().backward()
    assert close([p.grad for p in model.parameters()], expected, 0.03)


def test_repeated_matmuls_are_freed_after_the_backward():
    for kind in (None, "reentrant", "non-reentrant"):
        model = mesa_train.wrap(Checkpointed(kind), Policy(min_bytes=0, recompute="linear"))
        gradients(model, images())
        assert not stash.neighbours.values


def test_timms_own_checkpointing():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5
    )
    mesa_train.wrap(model, EIGHT)
    expected = gradients(model, images())
    model.set_grad_checkpointing(True)
    assert same(gradients(model, images()), expected)


def test_gradient_accumulation():
    plain, model = Checkpointed(None), mesa_train.wrap(Checkpointed(None), LOSSLESS)
    for m in (plain, model):
        for seed in (1, 2):
            m(images(seed)).square().mean().backward()
    assert close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], 1e-5)
    model = mesa_train.wrap(Checkpointed(None), EIGHT)
    outputs = [model(images(seed)).square().mean() for seed in (1, 2)]
    for output in reversed(outputs):
        output.backward()
    assert close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], 0.03)


# --- around it ---


def test_compress_around_functions():
    x = torch.randn(32, 64).requires_grad_()
    size, output = kept_bytes(lambda: F.gelu(x.mul(1.0)))
    assert size == 32 * 64 * 4

    def compressed():
        with compress(EIGHT):
            return F.gelu(x.mul(1.0))

    size, output = kept_bytes(compressed)
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
