"""One model made ready for several methods, on the same parameters: exact gradients, and bytes saved."""

import pytest
import timm
import torch
import torch.nn.functional as F

from mesa_train import footprint
from mesa_train.methods.checkpointing import NoBlocks
from mesa_train.methods.variants import Variant

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def model():
    # Two blocks: compiling is what takes the time.
    torch.manual_seed(0)
    yield timm.create_model("test_vit", depth=2, num_classes=10, img_size=64)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def compiled(model):
    return Variant(model, "compile")


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(4, 3, 64, 64)


def runner(images):
    def run(module):
        return F.cross_entropy(module(images), torch.arange(len(images)))

    return run


def gradients(model, variant, images):
    with variant.active() as module:
        runner(images)(module).backward()
    result = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    return result


@pytest.mark.parametrize(
    "method",
    [
        "plain",
        "checkpoint",
        "checkpoint+offload",
        "save_on_cpu",
        pytest.param("compile", marks=pytest.mark.slow),
    ],
)
def test_exact_methods_give_plain_gradients_to_the_shared_parameters(
    model, images, method, request
):
    variant = request.getfixturevalue("compiled") if method == "compile" else Variant(model, method)
    expected = gradients(model, Variant(model, "plain"), images)
    result = gradients(model, variant, images)
    tolerance = 1e-5 if method == "compile" else 0  # Inductor sums in another order.
    for a, b in zip(result, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_float8_is_torchaos_on_the_shared_parameters(model, images):
    pytest.importorskip("torchao.float8")
    variant = Variant(model, "float8")
    names = {type(m).__name__ for m in variant.module.modules()}
    assert "Float8Linear" in names
    assert "Float8Linear" not in {type(m).__name__ for m in model.modules()}
    expected = gradients(model, Variant(model, "plain"), images)
    result = gradients(model, variant, images)
    for a, b in zip(result, expected, strict=True):
        assert 0 < (a - b).norm() < 0.3 * b.norm()


def test_kept_bytes_are_those_of_the_footprint(model, images):
    def whole(module):
        with torch.autocast("cpu", BF16):
            return module(images).float().sum()

    for method in ("plain", "mesa8", "checkpoint"):
        counted = Variant(model, method).saved_bytes(whole)
        expected = footprint(model, images, policy=method, autocast=BF16).saved_bytes
        assert counted == expected, method


@pytest.mark.slow
def test_compiled_with_a_preset_or_a_budget(model, images, compiled):
    run = runner(images)
    eager = Variant(model, "mesa8").saved_bytes(run)
    coded = Variant(model, "compile:mesa8").saved_bytes(run)
    plain = compiled.saved_bytes(run)
    assert coded <= 1.1 * eager
    assert coded < plain / 2
    assert Variant(model, "compile-budget-0.5").saved_bytes(run) < plain


def test_the_model_stays_as_it_was(model, images):
    before = {name: id(p) for name, p in model.named_parameters()}
    variant = Variant(model, "mesa8")
    assert type(model).__name__ == "VisionTransformer"
    assert {name: id(p) for name, p in variant.module.named_parameters()} == before


def test_an_unknown_method(model):
    with pytest.raises(ValueError, match=r"unknown method 'compil' .*did you mean 'compile'"):
        Variant(model, "compil")


def test_nothing_to_checkpoint():
    with pytest.raises(NoBlocks, match="no row of equal blocks"):
        Variant(torch.nn.Linear(2, 2), "checkpoint")
