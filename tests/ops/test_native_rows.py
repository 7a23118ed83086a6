"""Native rows against Python rows: the same outputs, gradients and reports, bit for bit."""

import copy
import pickle
import threading
import warnings
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from operator_case import EVERY, run
from operator_cases import CASES
from seeding import seed_torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mesa_train import Policy, compress, wrap
from mesa_train.engine import native
from mesa_train.engine.intercept import CompressionMode
from mesa_train.engine.wrap import report_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
ALL = Policy(min_bytes=0)


@pytest.fixture(autouse=True)
def _extension():
    native.prepare(CompressionMode)
    if native.extension is None:
        pytest.skip("no compiler, or MESA_TRAIN_NATIVE=0")


def in_python():
    return native.python_rows(CompressionMode)


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))


def transposed(leaf):
    return (
        leaf.mT.clone(memory_format=torch.contiguous_format).mT if leaf.dim() > 1 else leaf.clone()
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", [None, transposed], ids=["contiguous", "transposed"])
def test_every_operator(case, layout):
    # Also in the dtypes of PyTorch's own kernels, which the Python rows are tested in.
    for preset in ("mesa8", "mesa4-recompute", "lossless"):
        found = run(case, EVERY[preset], torch.float32, layout)
        with in_python():
            expected = run(case, EVERY[preset], torch.float32, layout)
        assert_equal(found[0], expected[0])
        assert_equal(found[1], expected[1])


class DINOBlock(nn.Module):
    """A block with layer scales, a SwiGLU and a causal attention."""

    def __init__(self, width=32):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, 48), nn.Linear(width, 48, bias=False)
        self.down = nn.Linear(48, width)
        self.scale1, self.scale2 = (nn.Parameter(torch.rand(width)) for _ in range(2))
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.drop(self.out(h))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h)).mul_(self.scale2)


def model_and_batch(name):
    seed_torch(0)
    if name == "blocks":
        return nn.Sequential(*[DINOBlock() for _ in range(2)]).train(), torch.randn(2, 9, 32)
    options = {"vit": {"depth": 2, "embed_dim": 48, "num_heads": 3}, "swin": {}}[name]
    kind = {"vit": "vit_tiny_patch16_224", "swin": "swin_tiny_patch4_window7_224"}[name]
    if name == "swin":
        options = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 24, "window_size": 4}
    model = timm.create_model(kind, img_size=32, patch_size=4, num_classes=5, **options)
    return model.train(), torch.randn(2, 3, 32, 32)


def step(model, x, dtype=None):
    """Output, gradients, report and the bytes of all tensors that the nodes save."""
    seed_torch(1)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = model(x)
    nodes, todo, saved = set(), [output.grad_fn], {}
    while todo:
        node = todo.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        todo += [following for following, _ in node.next_functions]
        for tensor in getattr(node, "saved_tensors", ()):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    output.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    return output.detach(), gradients, dict(report_of(model).rows), sum(saved.values())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("preset", ["mesa8", "mesa4", "mesa8-recompute", "lossless", "paper"])
@pytest.mark.parametrize("name", ["vit", "swin", "blocks"])
def test_models(name, preset, autocast):
    model, x = model_and_batch(name)
    wrap(model, EVERY[preset])
    with in_python():
        expected = step(model, x, autocast)
    if preset == "paper":  # the running ranges of the first step
        model = wrap(model_and_batch(name)[0], EVERY[preset])
    found = step(model, x, autocast)
    assert torch.equal(found[0], expected[0])
    assert_equal(found[1], expected[1])
    assert found[2:] == expected[2:]


def native_nodes(output):
    names, todo, seen = [], [output.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "saved_tensors") and not hasattr(type(node), "_forward_cls"):
            names.append(node.name())
        todo += [following for following, _ in node.next_functions]
    return sorted(names)


def test_which_nodes_are_native():
    model, x = model_and_batch("blocks")
    wrap(model[:1], ALL)
    assert native_nodes(model[0](x.requires_grad_())) == sorted(
        ["TokenNormBackward"] * 2
        + ["LinearBackward"] * 4  # the first layer scale took over the fifth
        + ["ScaledLinearBackward"] * 2
        + ["FlashCPUBackward", "SmoothBackward", "MulBackward"]
    )
    with in_python():
        assert native_nodes(model[0](x)) == []


@pytest.mark.parametrize("rows", ["native", "python"])
def test_a_second_derivative_is_an_error(rows):
    x = torch.randn(4, 32, requires_grad=True)
    with compress(ALL):
        y = F.gelu(F.linear(x, torch.randn(32, 32, requires_grad=True)))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative through 'linear'"):
        grad.sum().backward()
    # With respect to the incoming gradient too.
    weight = torch.ones_like(y, requires_grad=True)
    with compress(ALL):
        y = F.gelu(x * 1.0)
    (grad,) = torch.autograd.grad(y, x, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative through 'activation'"):
        torch.autograd.grad(grad.sum(), weight)


def test_errors_of_the_graph_are_pytorchs():
    model = wrap(nn.Linear(8, 8), ALL)
    loss = model(torch.randn(2, 8)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = model(torch.randn(2, 8, requires_grad=True)).sum()
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(2, 9))
    # The failed call leaves the mode and the context as they were.
    model(torch.randn(2, 8)).sum().backward()


def test_products_of_wrong_dims_are_pytorchs_errors():
    batch, matrix = torch.randn(2, 3, 3, requires_grad=True), torch.randn(3, 3)
    with compress(ALL):
        with pytest.raises(RuntimeError):
            torch.bmm(batch, matrix)
        with pytest.raises(RuntimeError):
            torch.mm(batch, matrix)
        assert torch.matmul(batch, matrix).shape == (2, 3, 3)


def test_retained_graphs_and_partial_gradients():
    model, x = model_and_batch("blocks")
    wrap(model, ALL)
    loss = model(x.requires_grad_()).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    second = torch.autograd.grad(loss, [x, *model.parameters()])
    assert_equal([dx, *first], second)


class Decodes(TorchDispatchMode):
    """The number of decoded leaves, and weak references to them."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.mesa_train.affine_decode.default:
            self.results.append(weakref.ref(result.untyped_storage()))
        return result


def test_attentions_output_is_decoded_once_for_its_two_readers():
    model, x = model_and_batch("vit")
    wrap(model, ALL)
    loss = model(x).square().sum()
    with Decodes() as decodes:
        loss.backward(retain_graph=True)
        first = len(decodes.results)
        loss.backward()
    # Of each of two blocks: q, k, v, the output, and two norms' outputs. Besides them: the last
    # norm's output, and the input of the patch embedding's convolution if it is coded.
    assert first == len(decodes.results) - first
    assert first - 2 * 6 in (1, 2)
    assert all(r() is None for r in decodes.results), "nothing outlives the backward"


def test_batched_gradients():
    x = torch.randn(3, 8, requires_grad=True)
    with compress(ALL):
        y = F.linear(F.gelu(x * 1.0), torch.randn(4, 8, requires_grad=True))
    weights = torch.randn(5, 3, 4)
    (batched,) = torch.autograd.grad(y, x, weights, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, x, weight, retain_graph=True)[0] for weight in weights]
    torch.testing.assert_close(batched, torch.stack(each))


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(reentrant):
    model, x = model_and_batch("blocks")
    plain = step(wrap(copy.deepcopy(model), ALL), x)

    class Checkpointed(nn.Sequential):
        def forward(self, x):
            for block in self:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    checked = Checkpointed(*copy.deepcopy(model))
    found = step(wrap(checked, ALL), x.requires_grad_())
    assert torch.equal(found[0], plain[0])
    assert_equal(found[1], plain[1])


def test_copies_and_pickles_after_a_step():
    model, x = model_and_batch("blocks")
    wrap(model, ALL)
    expected = step(model, x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = step(again, x)
        assert_equal(found[1], expected[1])
        assert found[2] == expected[2]


def test_threads():
    """Models trained side by side in threads: each backward has results of its own."""
    expected, found = {}, {}

    def train(seed, results):
        generator = torch.Generator().manual_seed(seed)
        model = wrap(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), ALL)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for _ in range(10):
            x = torch.randn(32, 16, generator=generator)
            model(x).square().mean().backward()
        results[seed] = [p.grad for p in model.parameters()]

    for seed in range(4):
        train(seed, expected)
    threads = [threading.Thread(target=train, args=(seed, found)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert_equal(found[seed], expected[seed])


def test_nothing_is_left_after_a_step():
    """A backward frees the saved tensors, and a graph that nobody uses frees its nodes."""
    model, x = model_and_batch("blocks")
    wrap(model, ALL)
    output = model(x).sum()
    todo = [output.grad_fn]
    while not hasattr(todo[-1], "saved_tensors"):
        todo += [node for node, _ in todo.pop().next_functions if node is not None]
    node = todo[-1]
    assert node.saved_tensors
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        _ = node.saved_tensors


def test_a_user_who_replaces_a_function_of_torch_nn_is_heard(monkeypatch):
    calls = []
    linear = F.linear

    def counted(*args, **kwargs):
        calls.append(1)
        return linear(*args, **kwargs)

    model = wrap(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), ALL)
    x = torch.randn(2, 8, requires_grad=True)
    monkeypatch.setattr(F, "linear", counted)
    model(x)
    assert calls == [1]


def test_another_mode_sees_every_call():
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model = wrap(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()), ALL)
    with Watch():
        model(torch.randn(2, 8, requires_grad=True))
    assert {"native_layer_norm", "linear", "gelu"} <= set(seen)


def test_a_default_device_is_no_other_mode():
    model = wrap(nn.Linear(8, 8), ALL)
    with torch.device("cpu"):
        assert native_nodes(model(torch.randn(2, 8))) == ["LinearBackward"]


def test_without_a_compiler_there_is_one_warning(tmp_path, monkeypatch, caplog):
    from mesa_train.native import build

    monkeypatch.setenv("MESA_TRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "a-compiler-that-does-not-exist")
    assert build.load() is None
    assert "a-compiler-that-does-not-exist" in caplog.text
    monkeypatch.setenv("MESA_TRAIN_NATIVE", "0")
    caplog.clear()
    assert build.load() is None
    assert not caplog.text


def test_without_pythons_headers_there_is_one_warning(tmp_path, monkeypatch, caplog):
    from mesa_train.native import build

    monkeypatch.setattr(build, "_HEADERS", str(tmp_path))
    assert build.load() is None
    assert "Python.h" in caplog.text


def test_the_first_call_of_mesa_train_warns_about_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(nn.Linear(4, 4), ALL)(torch.randn(2, 4)).sum().backward()
