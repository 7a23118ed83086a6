"""MODEL strings: what they build, and what is said about those that build nothing."""

import sys

import pytest
import torch
from torch import nn

from mesa_train.loading import model as load_module
from mesa_train.loading.model import load

# Deliberately on the meta device: nothing is allocated and nothing initialised.
META = {"device": "meta"}


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("vit_tiny_patch16_224", "VisionTransformer", [8, 3, 224, 224]),
        ("timm:swinv2_tiny_window8_256", "SwinTransformerV2", [8, 3, 256, 256]),
        ("torchvision:vit_b_16", "VisionTransformer", [8, 3, 224, 224]),
        ("torchvision:inception_v3", "Inception3", [8, 3, 299, 299]),
        ("hf:vit", "ViTForImageClassification", [8, 3, 224, 224]),
        ("hf:deit", "DeiTForImageClassification", [8, 3, 224, 224]),
        ("hf:Dinov2Model", "Dinov2Model", [8, 3, 518, 518]),
        ("hf:SwinConfig", "SwinForImageClassification", [8, 3, 224, 224]),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_schemes(name, kind, shape):
    loaded = load(name, **META)
    assert type(loaded.model).__name__ == kind
    assert loaded.model.training
    assert loaded.name == name
    if shape != [8, 3, 518, 518]:
        assert loaded.shapes() == [shape]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "torchvision:vit_b_16", "torchvision:maxvit_t", "hf:vit"]
)
def test_sizes(name):
    loaded = load(name, batch_size=3, image_size=448, **META)
    assert loaded.shapes() == [[3, 3, 448, 448]]


def test_weights_and_images_are_repeatable():
    state = torch.get_rng_state()
    first, second = (load("vit_tiny_patch16_224", image_size=32, batch_size=1) for _ in range(2))
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.model.head.weight, second.model.head.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_huggingface_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.image_size = 32
    config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        loaded = load(f"hf:{name}", batch_size=2)
        assert loaded.inputs["pixel_values"].shape == (2, 3, 32, 32)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    weight = load(f"hf:{tmp_path}").model.classifier.weight
    assert torch.equal(weight, model.classifier.weight)


def test_factory(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn, randn\n"
        "def images(): return nn.Conv2d(3, 4, 3)\n"
        "def both(): return nn.Linear(4, 4), {'input': randn(2, 4)}\n"
        "def neither(): return 3\n"
    )
    (tmp_path / "my_broken.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load("python:my_models.images", batch_size=2).shapes() == [[2, 3, 224, 224]]
    assert load("python:my_models.both").inputs["input"].shape == (2, 4)
    with pytest.raises(TypeError, match="got int"):
        load("python:my_models.neither")
    with pytest.raises(ValueError, match=r"no callable in my_models 'bot'; close names: both"):
        load("python:my_models.bot")
    with pytest.raises(ValueError, match="there is no module named 'no_such_package'"):
        load("python:my_broken.build")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tim:vit", "unknown scheme 'tim'"),
        ("vit_smal_patch16_224", "close names: vit_small_patch16_224"),
        ("torchvision:vit_b16", "close names: vit_b_16"),
        ("hf:vitt", "close names: vit"),
        ("hf:bert", "no image_size"),
        ("hf:.", "without a config.json"),
        ("python:build", "must name a module and a function in it"),
        ("python:no_such_module.build", "there is no module named 'no_such_module'"),
    ],
)
def test_unknown(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(name, **META)


def test_not_a_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a transformers config"):
        load(f"hf:{tmp_path}", **META)


@pytest.mark.parametrize("name", ["torchvision:vit_b_16", "xcit_nano_12_p8_224"])
def test_refused_image_size(name):
    with pytest.raises(ValueError, match="with images of 225x225"):
        load(name, image_size=225, **META)


def test_image_size_refused_by_the_forward(monkeypatch):
    monkeypatch.setattr(load_module.importlib, "import_module", lambda _: _Factories)
    with pytest.raises(ValueError, match="does not accept images of 5x5"):
        load("python:anything.build", image_size=5, **META)


class _Factories:
    @staticmethod
    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'mesa_train\[timm\]'"):
        load("vit_tiny_patch16_224", **META)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"image_size": 0}])
def test_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        load("vit_tiny_patch16_224", **wrong)


def test_our_own_models_have_timm_names():
    loaded = load("litv2_tiny", batch_size=2, device="meta")
    assert type(loaded.model).__name__ == "LITv2"
    assert loaded.inputs.shape == (2, 3, 32, 32)
