"""Backbones of transformers in the dense recipes: `hf:NAME` of a folder that was written to disk."""

import folders
import pytest
import torch
from transformers import (
    AutoBackbone,
    BertConfig,
    ConvNextConfig,
    ResNetConfig,
    SwinConfig,
    SwinForImageClassification,
    VitDetConfig,
)

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.dense import fit
from mesa_train.training.dense.build import model_of
from mesa_train.training.dense.config import of_dict

SWIN = {
    "image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2],
    "window_size": 4, "num_labels": 3,
}  # fmt: skip
VITDET = {
    "image_size": 64, "pretrain_image_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "window_size": 2, "window_block_indices": [0],
}  # fmt: skip


def config(kind, path, out="out", **model):
    return of_dict({
        "model": {"kind": kind, "backbone": f"hf:{path}", "drop_path": 0.0} | model,
        "data": {"path": str(out), "train": "train", "val": "val", "short_side": 64, "long_side": 96,
                 "workers": 0} | ({"format": "ade"} if kind == "semantic_fpn" else {}),
        "augment": {"crop": 64} if kind == "semantic_fpn" else {},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1, "device": "cpu", "precision": "no",
                  "pictures": 0, "out": str(out / "run") if out != "out" else "run"},
    })  # fmt: skip


@pytest.fixture
def swin(tmp_path):
    SwinConfig(**SWIN).save_pretrained(tmp_path / "swin")
    return tmp_path / "swin"


@pytest.mark.parametrize("kind", ["retinanet", "mask_rcnn", "semantic_fpn"])
def test_a_configuration_on_disk_is_a_backbone_whose_trained_parameters_have_gradients(kind, swin):
    torch.manual_seed(0)
    model = model_of(config(kind, swin), 3).train()
    images = [torch.rand(3, 64, 96)]
    if kind == "semantic_fpn":
        losses = model(images[0][None], torch.zeros(1, 64, 96, dtype=torch.int64))
    else:
        target = {"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, 64, 96, dtype=torch.uint8)
        losses = model(images, [target])
    sum(losses.values()).backward()
    body = model.backbone.body
    # DistributedDataParallel refuses parameters without a gradient.
    missing = {name for name, p in body.named_parameters() if p.grad is None}
    assert {name.removeprefix("model.swin.") for name in missing} == {
        "layernorm.weight",
        "layernorm.bias",
    }
    assert not any(p.requires_grad for name, p in body.named_parameters() if name in missing)
    assert [x.shape[-1] for x in body(images[0][None])] == [
        96 // stride for stride in ((8, 16, 32) if kind == "retinanet" else (4, 8, 16, 32))
    ]


def test_the_weights_of_a_classifiers_folder_fill_the_backbone(tmp_path):
    torch.manual_seed(1)
    classifier = SwinForImageClassification(SwinConfig(**SWIN))
    classifier.save_pretrained(tmp_path / "swin")
    model = model_of(config("faster_rcnn", tmp_path / "swin", pretrained=True), 3)
    theirs = classifier.state_dict()
    found = 0
    for key, value in model.backbone.body.state_dict().items():
        key = key.removeprefix("model.")
        if key in theirs:
            assert torch.equal(value, theirs[key]), key
            found += 1
    assert found > 50
    random = model_of(config("faster_rcnn", tmp_path / "swin"), 3)
    key = "swin.embeddings.patch_embeddings.projection.weight"
    weight = random.backbone.body.model.state_dict()[key]
    assert not torch.equal(weight, theirs[key])


def test_a_backbone_of_one_stride_has_a_simple_pyramid(tmp_path):
    VitDetConfig(**VITDET).save_pretrained(tmp_path / "vit")
    model = model_of(config("retinanet", tmp_path / "vit"), 3)
    with torch.no_grad():
        maps = model.backbone(torch.rand(1, 3, 64, 96))
    assert [x.shape[-1] for x in maps.values()] == [12, 6, 3, 2, 1]


def test_options_and_mistakes(tmp_path, swin):
    body = model_of(config("retinanet", swin, drop_path=0.1), 3).backbone.body.model
    assert body.config.drop_path_rate == 0.1
    body = model_of(config("retinanet", swin, grad_checkpointing=True), 3).backbone.body.model
    # The second is its name before transformers 5.
    assert getattr(body, "is_activation_checkpointing", False) or body.is_gradient_checkpointing
    ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]).save_pretrained(
        tmp_path / "next"
    )
    assert model_of(config("retinanet", tmp_path / "next"), 3)
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]).save_pretrained(
        tmp_path / "resnet"
    )
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    VitDetConfig(**VITDET | {"patch_size": 8}).save_pretrained(tmp_path / "fine")
    (tmp_path / "empty").mkdir()
    for folder, model, message in (
        ("resnet", {"drop_path": 0.2}, r"model.drop_path=0.2: a resnet has none; set it to 0"),
        ("bert", {}, r"transformers has no backbone of type 'bert' \(hf:.*bert\); it has beit, "),
        ("empty", {}, r"model.backbone=hf:.*empty: "),
        ("fine", {}, r"a plain ViT's pyramid has strides 1/4, 1/2, 1 and 2 times its patch, not 4"),
        ("swin", {"window": 4}, r"model.window=4 is for litv2_\* and plain ViTs, not hf:"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            model_of(config("retinanet", tmp_path / folder, **model), 3)
        assert "\n" not in str(error.value)


def test_a_run_trains_on_a_configuration_on_disk(tmp_path, swin):
    folders.coco_folder(tmp_path / "data", train=2, val=1)
    values = config("retinanet", swin, tmp_path / "data")
    run = fit.prepare(values)
    assert isinstance(
        run.bare.backbone.body.model, type(AutoBackbone.from_config(SwinConfig(**SWIN)))
    )
    assert 0 <= fit.fit(run)["ap"] <= 1
