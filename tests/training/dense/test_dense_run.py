"""Runs of detectors and segmenters: exact resume, refusals, strangers' folders, files of a run."""

import json
import re
import shutil
from pathlib import Path

import folders
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mesa_train.training import checkpoints
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.dense import fit as recipe
from mesa_train.training.dense.build import model_of, start_from
from mesa_train.training.dense.composed import write_maps
from mesa_train.training.dense.config import load, of_dict
from mesa_train.training.dense.memory import memory, worst_shape
from mesa_train.training.dense.optimizers import groups, rate
from mesa_train.training.dense.tasks import task_of

RECIPES = Path(__file__).resolve().parents[3] / "recipes/dense"
TIMELESS = ("step", "loss", "grad_norm", "lr", "train_loss", "ap", "miou", "classification")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return folders.strange_folder(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    counts = {"training": 5, "validation": 2}
    return write_maps(tmp_path_factory.mktemp("maps"), counts, **folders.OPTIONS)


def config(kind, folder, out, **train):
    data = {"path": str(folder), "short_side": 64, "long_side": 80, "workers": 0}
    augment = {"scale": (0.6, 1.0)}
    if kind == "semantic_fpn":
        data |= {"format": "ade"}
        augment |= {"crop": 64}
    else:
        data |= {"train": "train", "val": "val"}
    values = {
        "model": {"kind": kind, "backbone": "litv2_tiny"},
        "data": data,
        "augment": augment,
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "train": {
            "epochs": 2, "global_batch": 2, "micro_batch": 1, "log_every": 1, "device": "cpu",
            "precision": "no", "pictures": 1, "out": str(out),
        } | train,
    }  # fmt: skip
    return of_dict(values)


def rows(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in TIMELESS} for line in lines]


class StopError(Exception):
    """Ends a run in the middle."""


@pytest.mark.parametrize(
    ("kind", "policy"),
    [pytest.param("retinanet", "mesa8", marks=pytest.mark.slow), ("semantic_fpn", "plain")],
)
def test_a_run_that_was_stopped_continues_exactly(coco, maps, tmp_path, kind, policy, monkeypatch):
    folder = maps if kind == "semantic_fpn" else coco
    whole = recipe.prepare(config(kind, folder, tmp_path / "whole", policy=policy))
    assert not recipe.resume(whole, "")
    scores = recipe.fit(whole)
    assert scores[whole.task.metric] >= 0

    cut = recipe.prepare(config(kind, folder, tmp_path / "cut", policy=policy, save_every=1))
    step = type(cut).step

    def stopping(run, batches):
        if run.done == 3:
            raise StopError
        return step(run, batches)

    monkeypatch.setattr(type(cut), "step", stopping)
    with pytest.raises(StopError):
        recipe.fit(cut)
    monkeypatch.undo()
    again = config(kind, folder, tmp_path / "cut", policy=policy, save_every=1)
    with pytest.raises(ConfigError, match=r"holds a run already: --resume auto continues it"):
        recipe.resume(recipe.prepare(again), "")
    resumed = recipe.prepare(again)
    assert recipe.resume(resumed, "auto")
    assert resumed.done == 3
    assert recipe.fit(resumed) == scores
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    ends = [
        load_file(tmp_path / name / "checkpoints/last/model.safetensors")
        for name in ("whole", "cut")
    ]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    files = {path.name for path in (tmp_path / "cut").iterdir()}
    assert files == {
        "best.safetensors",
        "checkpoints",
        "curves.png",
        "metrics.jsonl",
        "predictions.png",
    }
    with pytest.raises(ConfigError, match=r"train.global_batch=1, but .* was trained with 2"):
        recipe.resume(
            recipe.prepare(config(kind, folder, tmp_path / "cut", global_batch=1)), "auto"
        )
    # The best weights are a start, and score the same.
    best = config(kind, folder, tmp_path / "new")
    object.__setattr__(best.model, "weights", str(tmp_path / "cut/best.safetensors"))
    assert max(row.get(resumed.task.metric, 0) for row in rows(tmp_path / "cut")) == pytest.approx(
        recipe.prepare(best).evaluate()[resumed.task.metric]
    )


@pytest.mark.slow
def test_a_mask_rcnn_trains_on_a_strangers_folder(coco, tmp_path):
    run = recipe.prepare(config("mask_rcnn", coco, tmp_path, epochs=1, policy="mesa8"))
    scores = recipe.fit(run)
    assert {"ap", "mask_ap"} <= scores.keys()
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["loss_mask"] > 0
    assert (tmp_path / "predictions.png").is_file()


def test_without_objects_to_score_the_newest_weights_are_kept(tmp_path, caplog):
    folder = folders.coco_folder(tmp_path / "coco")
    folders.change(folder, lambda values: values["annotations"].clear(), "val")
    run = recipe.prepare(config("retinanet", folder, tmp_path / "run", epochs=2, pictures=0))
    assert "instances_val.json: no object to score" in caplog.text
    assert recipe.fit(run) == {}
    assert recipe.shown({}) == "no score"
    with safe_open(tmp_path / "run/best.safetensors", "pt") as file:
        assert file.metadata()["step"] == str(run.done) == "4"


def test_composed_pictures_are_written_once(tmp_path):
    def opened(**data):
        values = {"format": "digits", "path": str(tmp_path / "digits"), "digits": "17"}
        values |= {"train_pictures": 3, "val_pictures": 2, "short_side": 64, "long_side": 96}
        return task_of(of_dict({"data": values | data}))

    assert opened().names == ("one", "seven")
    picture = tmp_path / "digits/train/000001.png"
    before = picture.stat().st_mtime_ns
    assert (len(opened().groups), opened().count) == (3, 2)
    assert picture.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"digits holds other pictures .*; choose another folder"):
        opened(train_pictures=4)
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"other is no folder of composed pictures"):
        opened(path=str(tmp_path / "other"))


def test_rates():
    optim = of_dict({}).optim
    found = [rate(optim, step, 1200, 100) for step in (0, 250, 500, 799, 800, 1099, 1100)]
    wanted = [1e-7, 1e-4 * 0.5005, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6]
    assert found == pytest.approx(wanted)
    poly = of_dict({"optim": {"schedule": "poly", "warmup_steps": 0}}).optim
    found = [rate(poly, step, 80_000, 1263) for step in (0, 40_000, 79_999)]
    wanted = [1e-4, 99e-6 * 0.5**0.9 + 1e-6, 1e-6 + 99e-6 * (1 / 80_000) ** 0.9]
    assert found == pytest.approx(wanted)


def test_norms_have_no_decay_in_mask_rcnn_alone():
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.BatchNorm1d(3)
    )
    by_name = {
        decay: groups(model, of_dict({"optim": {"decay": decay}}).optim)
        for decay in ("all", "not_norms")
    }
    assert [len(g["params"]) for g in by_name["all"]] == [6]
    weights, norms = by_name["not_norms"]
    assert [len(weights["params"]), len(norms["params"])] == [2, 4]
    assert (weights["weight_decay"], norms["weight_decay"]) == (1e-4, 0.0)


MISTAKES = [
    ({"model": {"kind": "retinnet"}}, r"model.kind must be one of .* \(did you mean retinanet\?\)"),
    ({"model": {"kind": "semantic_fpn"}}, r"semantic_fpn must be one of ade, voc, datasets, digits, got 'coco'"),
    ({"model": {"kind": "mask_rcnn"}, "data": {"format": "voc"}}, r"data.format=voc has no masks"),
    ({"data": {"short_side": 900, "long_side": 800}}, r"data.short_side=900 must be at most data.long_side=800"),
    ({"model": {"kind": "semantic_fpn"}, "data": {"format": "ade"}}, r"augment.crop is missing"),
    ({"model": {"kind": "mask_rcnn", "recompute_loss": True}}, r"recompute_loss=true does not run"),
    ({"data": {"format": "digits", "digits": "01x"}}, r"data.digits must be digits such as 0123, got '01x'"),
    ({"augment": {"crop": 32}}, r"augment.crop must be 0 or at least 64, got 32"),
    ({"augment": {"scale": [2, 1]}}, r"augment.scale must be a range"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes_are_one_line(number):
    values, message = MISTAKES[number]
    with pytest.raises(ConfigError, match=message):
        of_dict(values)


def test_mistakes_of_models_and_data(coco, tmp_path):
    def prepared(**sections):
        values = config("retinanet", coco, tmp_path / "x").to_dict()
        for section, fields in sections.items():
            values[section] |= fields
        return recipe.prepare(of_dict(values))

    with pytest.raises(ConfigError, match=r"no model 'litv2_xs' in timm; close names: litv2_s"):
        prepared(model={"backbone": "litv2_xs"})
    with pytest.raises(ConfigError, match=r"model.window=4 is for litv2_\* and plain ViTs"):
        prepared(model={"backbone": "resnet18", "window": 4})
    with pytest.raises(ConfigError, match=r"model.classes=80, but .* has 3: zero, one, two"):
        prepared(model={"classes": 80})
    with pytest.raises(ConfigError, match=r"data.path: no such folder nowhere"):
        prepared(data={"path": "nowhere"})
    with pytest.raises(ConfigError, match=r"instances_valid.json: the file cannot be read"):
        prepared(data={"val": "valid"})
    with pytest.raises(
        ConfigError, match=r"batch=6 is no multiple of train.micro_batch=4 .*; 3 would fit"
    ):
        prepared(train={"global_batch": 6, "micro_batch": 4})
    for backbone, message in (
        ("hiera_tiny_224", r"model.backbone=hiera_tiny_224: .* does not take images of 320x416"),
        ("hvt_ti_1", r"model.backbone=hvt_ti_1: .*'HVT' object has no attribute"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            prepared(model={"backbone": backbone, "drop_path": 0.0})
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"frozen_stages must be from 0 to 5 .*, got 6"):
        prepared(model={"frozen_stages": 6})
    (tmp_path / "w.pth").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"model.weights: .*w.pth is"):
        prepared(model={"weights": str(tmp_path / "w.pth")})
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(checkpoints.CheckpointError, match=r"w.pth is of another model; missing"):
        prepared(model={"weights": str(tmp_path / "w.pth")})


@pytest.mark.slow
def test_a_run_with_frozen_parts_continues_exactly(coco, tmp_path):
    """Frozen parts are in no group, do not change, and a checkpoint of them is resumed."""

    def opened(out, **train):
        values = config("retinanet", coco, out, epochs=1, pictures=0, **train).to_dict()
        values["model"] |= {"frozen_stages": 2, "freeze_batch_norm": True}
        return recipe.prepare(of_dict(values))

    run = opened(tmp_path / "run", save_every=1, keep=2)
    body = run.bare.backbone.body
    frozen = {k: v.clone() for k, v in body.state_dict().items() if k.startswith(
        ("patch_embed", "layers.0")) or "norm_layer" in k}  # fmt: skip
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    named = dict(body.named_parameters())
    assert id(named["layers.1.blocks.0.norm2.weight"]) in held
    assert not any(id(named[name]) in held for name in frozen if name in named)
    recipe.fit(run)
    after = body.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in frozen.items())
    last = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    whole = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    again = opened(tmp_path / "run", save_every=1, keep=2)
    assert recipe.resume(again, "auto")
    recipe.fit(again)
    resumed = load_file(last / "model.safetensors")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_the_weights_of_a_classifier_fill_frozen_batch_norms(tmp_path):
    torch.manual_seed(7)
    classifier = timm.create_model("resnet18", num_classes=5)
    torch.nn.init.uniform_(classifier.layer1[0].bn1.running_mean)
    torch.save({"model": classifier.state_dict()}, tmp_path / "c.pth")
    values = config("retinanet", tmp_path, tmp_path / "x").to_dict()
    values["model"] |= {
        "weights": str(tmp_path / "c.pth"),
        "backbone": "resnet18",
        "drop_path": 0.0,
    }
    values["model"] |= {"frozen_stages": 2, "freeze_batch_norm": True}
    model = model_of(of_dict(values), 3)
    start_from(model, of_dict(values))
    found = model.backbone.body.model.layer1[0].bn1.running_mean
    assert torch.equal(found, classifier.layer1[0].bn1.running_mean)


@pytest.mark.parametrize(
    "name",
    ["litv2_tiny", "vit_tiny_patch16_224", pytest.param("lit_ti", marks=pytest.mark.slow)],
)
def test_a_classifiers_weights_fill_the_backbone(name, tmp_path):
    torch.manual_seed(7)
    classifier = timm.create_model(name, num_classes=5)
    torch.save({"model": classifier.state_dict()}, tmp_path / "c.pth")
    values = config("retinanet", tmp_path, tmp_path / "x").to_dict()
    values["model"] |= {"weights": str(tmp_path / "c.pth"), "backbone": name, "drop_path": 0.0}
    model = model_of(of_dict(values), 3)
    start_from(model, of_dict(values))
    body = {k.replace("model.", ""): v for k, v in model.backbone.body.state_dict().items()}
    found = 0
    for key, value in classifier.state_dict().items():
        own = body.get(key.replace("patch_embed.proj", "patch_embed") if "vit" in name else key)
        if key == "pos_embed":
            value = value[:, 1:]
        if not key.startswith(("norm.", "head.", "cls_token")):
            assert torch.equal(own, value), key
            found += 1
    assert found > 50


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_valid(path):
    found = load(path)
    assert found.train.global_batch % found.train.micro_batch == 0
    if "quickstart" not in path.stem and "budget" not in path.stem:
        assert found.train.global_batch == 16
        assert found.train.micro_batch == 2
        assert found.optim.lr == (2e-4 if found.model.kind == "mask_rcnn" else 1e-4)
        assert found.model.drop_path == (0.3 if "_b" in found.model.backbone else 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(RECIPES.glob("budget_*.yaml")), ids=lambda path: path.stem)
def test_budgets_state_the_memory_that_is_predicted(path):
    stated, limit = re.search(r"# predicted: ([\d.]+) GiB of (\d+) GB", path.read_text()).groups()
    total = sum(memory(load(path), 80, torch.bfloat16).values())
    assert total / 2**30 == pytest.approx(float(stated), abs=0.06)
    # Kernels' workspace, the losses' arrays, the allocator's slack and the CUDA context.
    assert 1.1 * total + 2 * 2**30 < int(limit) * 1e9


def test_the_worst_shape():
    def shape(**sections):
        return worst_shape(of_dict(sections))

    assert shape() == (800, 1344)
    assert shape(augment={"scale": [0.5, 1.2]}) == (960, 1344)
    assert shape(data={"by_aspect": False}) == (1344, 1344)
    assert shape(data={"by_aspect": False}, train={"micro_batch": 1}) == (800, 1344)
    assert shape(augment={"crop": 1000}) == (1024, 1024)
    segmenter = {"model": {"kind": "semantic_fpn"}, "data": {"format": "ade"}}
    assert shape(**segmenter, augment={"crop": 500}) == (500, 500)
