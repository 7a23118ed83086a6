"""What makes a program of a model gets the plain model's: the program equals it and passes gradients on."""

import copy
import inspect
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from seeding import seed_torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from wrap_helpers import EIGHT, LOSSLESS, close, gradients, same

import mesa_train
from mesa_train.engine.wrap import policy_of

pytestmark = [
    # torch.jit and torch.ao.quantization are deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::torch.jit.TracerWarning"),
]

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU())
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(F.silu(self.body(x)))


def net():
    seed_torch(0)
    return Net()


class Whole(torch.fx.Tracer):
    """Traces into every module."""

    def is_leaf_module(self, module, name):
        return False


PROGRAMS = {
    "export": lambda m: torch.export.export(m, (X,)).module(),
    "export, strict": lambda m: torch.export.export(m, (X,), strict=True).module(),
    "fx": torch.fx.symbolic_trace,
    "fx, every module": lambda m: torch.fx.GraphModule(m, Whole().trace(m)),
    "make_fx": lambda m: make_fx(m)(X),
    "trace": lambda m: torch.jit.trace(m, X),
    "script": torch.jit.script,
}


def nodes(program):
    if isinstance(program, torch.jit.ScriptModule):
        return str(program.inlined_graph)
    return [(n.op, str(n.target)) for n in program.graph.nodes]


# What `compress` records within these is part of their program.
RECORDING = ["make_fx", "fx, every module"]


@pytest.mark.parametrize(
    ("by", "name"),
    [
        (by, name)
        for by in ("wrap", "a wrapped part", "compress")
        for name in PROGRAMS
        if by != "compress" or name not in RECORDING
    ],
)
def test_programs_are_the_plain_models(by, name):
    expected = PROGRAMS[name](net())
    model = net()
    if by == "compress":
        with mesa_train.compress(EIGHT):
            program = PROGRAMS[name](model)
    else:
        mesa_train.wrap(model if by == "wrap" else model.body, EIGHT)
        program = PROGRAMS[name](model)
    if not isinstance(program, torch.jit.ScriptModule):
        assert nodes(program) == nodes(expected)
    else:
        assert nodes(program).count("aten::") == nodes(expected).count("aten::")
    assert torch.equal(program(X), net()(X))
    owner = program if list(program.parameters()) else model
    wanted = gradients(net(), X)
    owner.zero_grad()
    program(X).square().sum().backward()
    found = [p.grad for p in owner.parameters()]
    # Modules that torch.fx does not trace into run wrapped.
    assert close(found, wanted, 0.03 if name == "fx" else 1e-5)
    if by == "wrap":  # and the model is as wrapped as it was
        assert policy_of(model) == EIGHT
        assert not same(gradients(model, X), wanted)
        mesa_train.unwrap(model)
        assert same(gradients(model, X), wanted)


@pytest.mark.parametrize("name", RECORDING)
def test_programs_made_under_compress_pass_gradients_on(name):
    if name == "make_fx" and torch.__version__ < "2.14":
        pytest.skip("make_fx detaches the output of an autograd.Function")
    model = net()
    with mesa_train.compress(LOSSLESS):
        program = PROGRAMS[name](model)
    program(X).square().sum().backward()
    owner = program if list(program.parameters()) else model
    assert close([p.grad for p in owner.parameters()], gradients(net(), X), 1e-5)


def positive(x):
    return x if x.sum() > 0 else -x


class Helped(nn.Module):
    def forward(self, x):
        return positive(x)


def test_fx_leaves_the_functions_whole_that_it_is_told_to():
    model = mesa_train.wrap(nn.Sequential(Helped(), nn.GELU()), EIGHT)
    tracer = Whole(autowrap_functions=(positive,))
    program = torch.fx.GraphModule(model, tracer.trace(model))
    assert torch.equal(program(X), model(X))


def vit():
    seed_torch(0)
    return torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=5)


def resnet():
    seed_torch(0)
    return timm.create_model("resnet10t").eval()


def test_torchvisions_feature_extractor():
    plain, model = vit(), mesa_train.wrap(vit(), EIGHT)
    assert get_graph_node_names(model) == get_graph_node_names(plain)
    node = get_graph_node_names(plain)[0][-4]
    expected, found = (create_feature_extractor(m, [node])(IMAGES)[node] for m in (plain, model))
    assert torch.equal(found, expected)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True)]
    assert close(*zip(*[pair for pair in pairs if pair[1] is not None], strict=True), 0.05)


def test_timms_feature_extractors():
    from timm.models import create_feature_extractor as graph_features

    name = "layer2"
    plain, model = (graph_features(m, [name]) for m in (resnet(), mesa_train.wrap(resnet())))
    assert torch.equal(model(IMAGES)[name], plain(IMAGES)[name])
    lists = []
    for wrapped in (False, True):
        seed_torch(0)
        features = timm.create_model("resnet10t", features_only=True).eval()
        lists.append((mesa_train.wrap(features) if wrapped else features)(IMAGES))
    assert same(*lists)


def test_entry_points_of_a_vit():
    seed_torch(0)
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3
    )
    model = mesa_train.wrap(copy.deepcopy(plain), EIGHT)
    assert torch.equal(model.forward_features(IMAGES), plain.forward_features(IMAGES))
    assert same(
        model.get_intermediate_layers(IMAGES, n=2), plain.get_intermediate_layers(IMAGES, n=2)
    )
    found, expected = (m.forward_intermediates(IMAGES) for m in (model, plain))
    assert same([found[0], *found[1]], [expected[0], *expected[1]])
    for m in (model, plain):
        m.forward_head(m.forward_features(IMAGES)).sin().sum().backward()
    assert close(*([p.grad for p in m.parameters()] for m in (model, plain)), 0.05)


def test_a_class_of_ones_own_is_scripted_after_a_wrapped_one():
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x, scale: float = 2.0):
            return F.gelu(self.linear(x)) * scale

    seed_torch(0)
    plain = Local()
    model = mesa_train.wrap(copy.deepcopy(plain), EIGHT)
    for module in (model, plain, model):
        assert torch.equal(torch.jit.script(module)(X), plain(X))


def test_a_forward_that_calls_a_local_function_is_scripted():
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    class Local(nn.Module):
        def forward(self, x):
            return shifted(doubled(F.gelu(x)))

    plain = Local()
    model = mesa_train.wrap(Local(), EIGHT)
    assert torch.equal(torch.jit.script(model)(X), plain(X))
    found, expected = (inspect.getclosurevars(m.forward).nonlocals for m in (model, plain))
    assert found.items() >= expected.items()


def kinds(model):
    return [type(m).__module__ for m in model.modules()]


def test_quantisations_keyed_by_type():
    from torch.ao import quantization

    results = []
    for wrapped in (False, True):
        model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5))
        if wrapped:
            mesa_train.wrap(model, EIGHT)
        dynamic = quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
        model.train().qconfig = quantization.get_default_qat_qconfig("x86")
        prepared = quantization.prepare_qat(model)
        results.append((kinds(dynamic), kinds(prepared)))
        prepared(X).sum().backward()
        assert torch.isfinite(dynamic(X)).all()
    assert results[0] == results[1]
    assert any("quantized" in kind for kind in results[0][0])


def test_a_prepared_model_is_wrapped():
    from torch.ao import quantization

    found = []
    for wrapped in (False, True):
        seed_torch(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).train()
        model.qconfig = quantization.get_default_qat_qconfig("x86")
        prepared = quantization.prepare_qat(model)
        found.append(gradients(mesa_train.wrap(prepared, LOSSLESS) if wrapped else prepared, X))
    assert close(found[1], found[0], 1e-5)


def test_a_graph_module_is_wrapped_copied_and_pickled():
    model = mesa_train.wrap(torch.fx.symbolic_trace(net()), EIGHT)
    expected = gradients(net(), X)
    assert close(gradients(model, X), expected, 0.03)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert policy_of(copied) == EIGHT
        assert same(gradients(copied, X), gradients(model, X))
        mesa_train.unwrap(copied)
        assert same(gradients(copied, X), expected)
