"""Linear evaluation and fine-tuning of an encoder of MoCo v3: what trains, what stays, what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch

from mesa_train.models.moco import MoCo
from mesa_train.training import checkpoints
from mesa_train.training.classification import dry_run
from mesa_train.training.classification import fit as recipe
from mesa_train.training.classification.config import load, of_dict
from mesa_train.training.classification.methods import method_of
from mesa_train.training.data import sources
from mesa_train.training.mistakes import MISTAKES
from mesa_train.training.moco import command

RECIPES = Path(__file__).resolve().parents[3] / "recipes/mocov3"
NAME = "moco_vit_tiny"


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    """200 training images: three steps of 64 an epoch."""
    whole = sources.load

    def few(*arguments):
        found = whole(*arguments)
        return dataclasses.replace(
            found, train=dataclasses.replace(found.train, count=200),
            val=dataclasses.replace(found.val, count=50),
        )  # fmt: skip

    monkeypatch.setattr(sources, "load", few)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The file of a run, and its encoder."""
    torch.manual_seed(3)
    model = timm.create_model(NAME, num_classes=0, img_size=14)
    path = tmp_path_factory.mktemp("run") / "encoder.safetensors"
    checkpoints.save_weights(path, model.state_dict(), {"model": NAME, "step": "6"})
    return path, model


def config(out, weights, method="linear", **changes):
    recipe_file = RECIPES / f"{'linear' if method == 'linear' else 'finetune_vit_small'}.yaml"
    values = load(recipe_file).to_dict()
    values["model"] |= {"name": NAME, "weights": str(weights), "drop_path": 0.0}
    values["data"] |= {
        "source": "digits", "path": None, "image_size": 14, "crop": False, "workers": 0,
        "pin_memory": False,
    }  # fmt: skip
    values["optim"] |= {"warmup_epochs": 0}
    values["train"] |= {
        "epochs": 2, "global_batch": 64, "micro_batch": 64, "precision": "no", "log_every": 1,
        "tracker": "none", "device": "cpu", "out": str(out),
    }  # fmt: skip
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return of_dict(values)


def rows(out, kind):
    found = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    timed = ("images_per_s", "step_ms")
    return [{k: v for k, v in r.items() if k not in timed} for r in found if r["kind"] == kind]


def trained(settings):
    run = recipe.prepare(settings)
    recipe.resume(run, "")
    recipe.fit(run, 0)
    return run


@pytest.mark.parametrize("policy", ["plain", "mesa8"])
def test_a_linear_evaluation_trains_the_classifier_alone(encoder, tmp_path, policy):
    path, model = encoder
    run = recipe.prepare(config(tmp_path, path, train__policy=policy))
    head = run.bare.head.weight.detach().clone()
    assert head.std().item() == pytest.approx(0.01, rel=0.1)
    assert torch.equal(run.bare.head.bias, torch.zeros(10))
    recipe.fit(run, 0)
    assert not torch.equal(run.bare.head.weight, head)
    own = run.bare.state_dict()
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())
    # 3 x 64 / 256, and the cosine's middle in the second of two epochs.
    assert [r["lr"] for r in rows(tmp_path, "step")] == pytest.approx([0.75] * 3 + [0.375] * 3)
    assert isinstance(run.optimizer.optimizer, torch.optim.SGD)
    (group,) = [g for g in run.optimizer.param_groups if g["name"] == "weights"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.0)
    assert sum(p.numel() for g in run.optimizer.param_groups for p in g["params"]) == 96 * 10 + 10


def test_the_encoder_is_in_eval_mode_and_keeps_nothing(encoder, tmp_path):
    run = recipe.prepare(config(tmp_path, encoder[0]))
    next(run.batches())
    assert not any(m.training for m in run.bare.modules())
    kept = dry_run.memory(run.config, 10)
    # The output of the last norm (5 tokens), of which the classifier's input is a view, and the
    # logarithms of the probabilities.
    assert kept["activations"] == 64 * (5 * 96 + 10) * 4
    assert kept["gradients"] == kept["optimizer"] == (96 * 10 + 10) * 4
    full = dry_run.memory(config(tmp_path, encoder[0], "finetune", train__policy="plain"), 10)
    assert full["activations"] > 20 * kept["activations"]


def test_a_changed_encoder_is_noticed(encoder, tmp_path):
    run = recipe.prepare(config(tmp_path, encoder[0]))
    run.method.finish_epoch(run)
    with torch.no_grad():
        run.bare.norm.bias[0] += 1
    with pytest.raises(RuntimeError, match=r"1 of \d+ tensors of the frozen encoder.*norm\.bias"):
        run.method.finish_epoch(run)


def test_batch_norms_of_a_frozen_encoder_stay(tmp_path):
    moco = MoCo(timm.create_model("resnet10t"), dim=8, hidden=16, projector_layers=2)
    checkpoints.save_weights(tmp_path / "model.safetensors", moco.state_dict(), {})
    settings = config(
        tmp_path / "out", tmp_path / "model.safetensors", model__name="resnet10t",
        data__image_size=32, train__epochs=1,
    )  # fmt: skip
    run = trained(settings)
    for key, value in moco.base_encoder.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(run.bare.state_dict()[key], value), key


@pytest.mark.slow
def test_a_linear_evaluation_that_is_cut_continues_exactly(encoder, tmp_path):
    whole = trained(config(tmp_path / "whole", encoder[0], train__save_every=2))
    run = recipe.prepare(config(tmp_path / "cut", encoder[0], train__save_every=2))
    step = run.step

    def interrupted(batches):
        if run.done == 5:
            raise KeyboardInterrupt
        return step(batches)

    run.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        recipe.fit(run, 0)
    again = recipe.prepare(config(tmp_path / "cut", encoder[0], train__save_every=2))
    assert recipe.resume(again, "auto")
    assert again.done == 4
    recipe.fit(again, 0)
    for key, value in whole.bare.state_dict().items():
        assert torch.equal(value, again.bare.state_dict()[key]), key
    assert rows(tmp_path / "whole", "step") == rows(tmp_path / "cut", "step")


def test_a_fine_tuning_starts_from_the_encoder_and_trains_all_of_it(encoder, tmp_path):
    path, model = encoder
    run = recipe.prepare(config(tmp_path, path, "finetune", train__epochs=1))
    before = {k: v.clone() for k, v in run.bare.state_dict().items()}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    recipe.fit(run, 0)
    for key in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "head.weight"):
        assert not torch.equal(run.bare.state_dict()[key], before[key]), key


def test_the_authors_files_are_read(tmp_path):
    options = {"img_size": 32, "depth": 1}
    moco = MoCo(timm.create_model("moco_vit_small", **options), dim=8, hidden=16)
    weights = {f"module.{k}": v for k, v in moco.state_dict().items()}
    torch.save({"epoch": 300, "state_dict": weights}, tmp_path / "vit.pth.tar")
    settings = config(tmp_path, tmp_path / "vit.pth.tar", "finetune")
    vit = timm.create_model("moco_vit_small", num_classes=10, **options)
    method_of(settings).load(vit, tmp_path / "vit.pth.tar")
    for key, value in moco.base_encoder.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(vit.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__weights": None}, "model.weights is missing: method.name=linear starts from"),
        ({"model__weights": "no.safetensors"}, "model.weights: no such file no.safetensors"),
        ({"model__name": "vit_tiny_patch16_224", "data__image_size": 32},
         "is of moco_vit_tiny, not of vit_tiny_patch16_224"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(encoder, tmp_path, changes, message):
    with pytest.raises(MISTAKES) as error:
        recipe.prepare(config(tmp_path / "out", encoder[0], **changes))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_values_of_the_configurations():
    linear = load(RECIPES / "linear.yaml")
    assert linear.optim.lr * linear.train.global_batch / linear.optim.lr_batch == 12
    optim = linear.optim
    assert (optim.name, optim.momentum, optim.weight_decay, optim.clip) == ("sgd", 0.9, 0, 0)
    assert (linear.train.epochs, optim.warmup_epochs, optim.min_lr, optim.rate_per) == (
        90, 0, 0, "epoch",
    )  # fmt: skip
    augment = linear.augment
    assert (augment.interpolation, augment.hflip, augment.scale) == ("bilinear", 0.5, (0.08, 1))
    off = (augment.mixup, augment.cutmix, augment.erase, augment.rand_augment)
    assert off == (0, 0, 0, "")
    for size, epochs in (("small", 300), ("base", 150)):
        found = load(RECIPES / f"finetune_vit_{size}.yaml")
        assert found.optim.lr * found.train.global_batch / found.optim.lr_batch == 1e-3
        assert (found.train.epochs, found.optim.weight_decay, found.model.drop_path) == (
            epochs, 0.05, 0.1,
        )  # fmt: skip


def test_the_command_tells_the_two_kinds_of_files_apart(capsys):
    options = ["data.source=digits", "data.train_images=2000", "model.classes=10"]
    command.train_from(RECIPES / "quickstart_linear.yaml", options, dry_run=True)
    assert "optimizer sgd" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"mocov3: unknown key model\.classes"):
        command.train_from(RECIPES / "quickstart.yaml", options, dry_run=True)
