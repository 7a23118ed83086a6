"""The recipes of the efficient ViTs: their files, their losses and groups, and short runs of each."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mesa_train.models.ecoformer import hashes_fitted
from mesa_train.training.classification import dry_run as plan
from mesa_train.training.classification import fit as recipe
from mesa_train.training.classification.command import train_from
from mesa_train.training.classification.config import load, of_dict
from mesa_train.training.config_schema import ConfigError

RECIPE = Path(__file__).resolve().parents[2] / "recipes/efficient"
CONFIGS = sorted(path.name for path in RECIPE.glob("*.yaml"))


def configured(out, model, size=64, weights=None, **method):
    values = {
        "model": {"name": model, "drop_path": 0.0, "weights": weights},
        "data": {"source": "digits", "image_size": size, "workers": 0, "pin_memory": False},
        "augment": {"rand_augment": "", "color_jitter": 0, "mixup": 0, "cutmix": 0},
        "optim": {"lr": 1e-3, "lr_batch": 0, "warmup_epochs": 0, "clip": 1e9},
        "train": {
            "epochs": 1, "global_batch": 4, "micro_batch": 4, "log_every": 1, "device": "cpu",
            "tracker": "none", "out": str(out), "precision": "no",
        },
        "method": method,
    }  # fmt: skip
    return of_dict(values)


def prepared(*args, **options):
    run = recipe.prepare(configured(*args, **options))
    run.out.mkdir(parents=True, exist_ok=True)
    return run


def steps(run, count=1):
    run.method.begin(run)
    batches = run.batches()
    losses = [run.step(batches)[0].item() for _ in range(count)]
    # A gradient that no step clears would grow and enter the norm of the clipping.
    assert not [n for n, p in run.bare.named_parameters() if p.grad is not None]
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_every_file_is_a_configuration_of_a_model(name, monkeypatch, tmp_path):
    config = load(RECIPE / name)
    if config.method.architecture is not None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match=r"method\.architecture: .*No such file"):
            plan.check_model(config, 10)
        return
    plan.check_model(config, config.model.classes or 10)
    if "imagenet" in name:
        assert config.optim.clip == 1e9
        assert config.model.classes == 1000


@pytest.mark.slow
def test_a_dry_run_counts_a_student_and_its_teacher(capsys, tmp_path):
    config = RECIPE / "dynamicvit_deit_s_imagenet.yaml"
    train_from(config, ["train.micro_batch=2"], dry_run=True)
    printed = capsys.readouterr().out
    assert "activations" in printed
    # DeiT-S without predictors: 22,050,664 float32 weights.
    assert "teacher 84.1 MiB" in printed
    assert "group backbone_weights" in printed


def test_a_dry_run_has_the_groups_of_the_method(tmp_path):
    config = configured(tmp_path, "spvit_deit_ti", name="spvit_search")
    groups = plan.parameter_groups(config, plan.build_model(config, 10, "meta"))
    assert [group["name"] for group in groups] == ["weights", "no_decay", "gates"]
    assert len(groups[-1]["params"]) == 24


@pytest.mark.slow
def test_dynamicvit_trains_its_predictors_first_and_freezes_positions(tmp_path):
    backbone = prepared(tmp_path / "a", "dynamicvit_deit_256", name="dynamicvit_backbone")
    steps(backbone)
    save_file(backbone.bare.state_dict(), tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    run = prepared(
        tmp_path / "b", "dynamicvit_deit_256", weights=weights, name="dynamicvit", frozen_epochs=1
    )
    before = {name: p.clone() for name, p in run.bare.named_parameters()}
    images, labels, _ = next(run.batches())
    losses = []
    for _ in range(2):  # the first call builds the teacher, which draws weights
        torch.manual_seed(0)
        losses.append(run.loss(*run.inputs(images, labels)).item())
    assert losses[0] == losses[1]
    (loss,) = steps(run)
    assert loss > 0
    changed = {n for n, p in run.bare.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(name.startswith("score_predictor.") for name in changed)
    for name, value in run.method.teacher.state_dict().items():
        assert torch.equal(value, load_file(weights)[name])
    free = prepared(
        tmp_path / "c", "dynamicvit_deit_256", weights=weights, name="dynamicvit", frozen_epochs=0
    )
    steps(free)
    same = {n for n, p in free.bare.named_parameters() if torch.equal(p, before[n])}
    assert {"cls_token", "pos_embed"} <= same
    assert "blocks.0.mlp.fc1.weight" not in same
    rates = {g["name"]: g["lr"] for g in free.optimizer.param_groups}
    assert rates["backbone_weights"] == pytest.approx(0.01 * rates["weights"])


def test_a_distillation_needs_a_teacher(tmp_path):
    run = prepared(tmp_path, "dynamicvit_deit_256", name="dynamicvit")
    with pytest.raises(ConfigError, match=r"method\.teacher: a distillation needs the weights"):
        steps(run)


@pytest.mark.slow
def test_ecoformer_goes_from_softmax_attention_to_fitted_hashes(tmp_path, monkeypatch):
    from mesa_train.models.ecoformer import fit

    descend = fit._descend
    monkeypatch.setattr(fit, "_descend", lambda *args: descend(*args[:3], 2, *args[4:]))
    first = prepared(tmp_path / "a", "ecoformer_pvt_v2_b0", 80, name="ecoformer", attention="msa")
    steps(first)
    save_file(first.bare.state_dict(), tmp_path / "w.safetensors")
    run = prepared(
        tmp_path / "b", "ecoformer_pvt_v2_b0", 80, str(tmp_path / "w.safetensors"),
        name="ecoformer", hash_images=2,
    )  # fmt: skip
    qkv = first.bare.block1[0].attn.qkv.weight
    assert torch.equal(run.bare.block1[0].attn.to_v.weight, qkv[64:])
    assert not hashes_fitted(run.bare)
    assert steps(run)[0] > 0
    assert hashes_fitted(run.bare)


@pytest.mark.slow
def test_spvits_search_hands_its_architecture_to_the_fine_tuning(tmp_path):
    search = prepared(
        tmp_path / "a", "spvit_deit_ti", name="spvit_search", target=0.01, budget_weight=1e3,
        gate_lr=0.5,
    )  # fmt: skip
    groups = {group["name"]: group for group in search.optimizer.param_groups}
    assert groups["gates"]["weight_decay"] == 0
    assert len(groups["gates"]["params"]) == 24
    cost = search.bare.cost().total.item()
    steps(search, 6)
    assert groups["gates"]["lr"] / groups["weights"]["lr"] == pytest.approx(500)
    assert search.bare.cost().total.item() < cost
    with torch.no_grad():
        for index, block in enumerate(search.bare.all_blocks()):
            block.mlp.ffn_thresholds.fill_(1.0)[: 10 + index] = -1.0
            block.attn.thresholds.copy_(torch.tensor([1.0, -1.0, 1.0] if index < 2 else [1.0] * 3))
    search.method.finish_epoch(search)
    path = search.out / "architecture.json"
    found = json.loads(path.read_text())
    assert found["msa"][:3] == [[1, 0, 0], [1, 0, 0], [1, 1, 1]]
    assert found["flops"] == int(search.bare.cost().total)
    pretrained = {}
    for key, value in search.bare.state_dict().items():
        if ".attn.v." in key:
            qk = search.bare.state_dict()[key.replace(".v.", ".qk.")]
            pretrained[key.replace(".v.", ".qkv.")] = torch.cat([qk, value])
        elif not any(
            part in key for part in (".qk.", "thresholds", "head_probs", "bn_", "assigned")
        ):
            pretrained[key] = value.clone()
    save_file(pretrained, tmp_path / "w.safetensors")
    run = prepared(
        tmp_path / "b", "spvit_deit_ti", weights=str(tmp_path / "w.safetensors"), name="spvit",
        architecture=str(path),
    )  # fmt: skip
    assert run.bare.kept == found["ffn_keep"]
    fc1 = pretrained["blocks.3.mlp.fc1.weight"]
    assert torch.equal(run.bare.blocks[3].mlp.fc1.weight, fc1[13:])
    assert run.bare.flops() == found["flops"]
    assert steps(run)[0] > 0


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        ("litv2_tiny", {"name": "ecoformer"}, "method.name=ecoformer: litv2_tiny has no such"),
        ("hvt_ti_1", {"name": "dynamicvitt"}, r"method\.name must be one of none, dynamicvit"),
        (
            "dynamicvit_deit_256",
            {"name": "dynamicvit", "keep_rate": 1.5},
            "keep_rate must be above",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, model, method, message):
    with pytest.raises(ConfigError, match=message):
        plan.check_model(configured(tmp_path, model, **method), 10)
