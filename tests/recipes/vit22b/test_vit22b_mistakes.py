"""What is wrong is said in a line, before memory is spent."""

import json
import os
import types
from pathlib import Path

import pytest
import timm
import torch

from mesa_train.models.vit22b import model as vit22b
from mesa_train.models.vit22b import parallel as vit22b_parallel
from mesa_train.training.checkpoints import CheckpointError
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.vit22b import zero3_checkpoint as sharded_zero
from mesa_train.training.vit22b.backend import check_precision
from mesa_train.training.vit22b.checkpoint import export, load_export, save
from mesa_train.training.vit22b.config import accumulation, load
from mesa_train.training.vit22b.launch import make_backend
from mesa_train.training.vit22b.zero3 import check_deepspeed

RECIPE = Path(__file__).resolve().parents[3] / "recipes/vit22b"
TINY = RECIPE / "tiny.yaml"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "model.name=vit_22",
            r"model\.name must be one of .*got 'vit_22' \(did you mean vit_22b\?",
        ),
        ("model.image_size=60", "multiple of the patch, 14; got 60"),
        ("model.nme=x", r"unknown key model\.nme; did you mean name\?"),
        ("train.policy=mesa9", r"train\.policy must be one of .*mesa8"),
        ("train.precision=fp16", r"needs loss scaling, .* take one of no, bf16, pure_bf16"),
        ("train.precision=fp32", r"train\.precision must be one of no, bf16, pure_bf16"),
        ("train.tensor_parallel=3", r"train\.tensor_parallel=3 must divide the 4 heads"),
        ("train.sequence_parallel=true", r"needs a train\.tensor_parallel above 1"),
        ("train.async_tensor_parallel=true", r"needs train\.sequence_parallel=true"),
        ("train.steps=3", r"optim\.warmup=2 and optim\.cooldown=2 exceed train\.steps=3"),
        ("optim.lr=fast", r"optim\.lr must be float, got 'fast'"),
        ("train.global_batch=0", r"train\.global_batch must be positive"),
        ("steps", r"--set takes section\.key=value"),
        ("data.source=imagefolder", r"data\.path is missing: imagefolder needs a folder"),
        ("data.path=/nowhere", r"data\.path: no such folder or file /nowhere"),
        ("data.image_size=99", r"data\.image_size is model\.image_size"),
        (
            "augment.scale=[0, 1]",
            r"augment\.scale must be a range within 0 and 1, got \[0\.0, 1\.0\]",
        ),
        ("augment.hflip=2", r"augment\.hflip must lie in \[0, 1\], got 2"),
        ("augment.ratio=[2, 1]", r"augment\.ratio must be a range within 0 and inf, got \[2\.0, 1"),
        ("model.drop_path=1", r"model\.drop_path must lie in \[0, 1\), got 1"),
        ("model.image_size=0", r"model\.image_size must be positive, got 0"),
        ("optim.timescale=0", r"optim\.timescale must be positive, got 0"),
        ("optim.betas=[0.9, 1]", r"optim\.betas must lie in \[0, 1\), got \[0\.9, 1\.0\]"),
        ("optim.cooldown=-1", r"optim\.cooldown must not be negative, got -1"),
        ("train.save_every=-1", r"train\.save_every must not be negative, got -1"),
    ],
)
def test_configuration(change, said):
    with pytest.raises(ConfigError, match=said):
        load(TINY, [change])


def test_coded_inputs_need_a_policy():
    with pytest.raises(ConfigError, match=r"needs a train\.policy other than plain"):
        load(TINY, ["train.checkpointing=coded", "train.policy=plain"])


def test_the_recipes_files_are_valid():
    files = sorted(RECIPE.glob("*.yaml"))
    assert TINY in files
    for file in files:
        load(file)


def engine(monkeypatch, *changes, world=1, **environment):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    return make_backend(load(TINY, changes), 10)


def test_launches_that_do_not_fit(monkeypatch):
    with pytest.raises(ConfigError, match=r"zero3 needs a DeepSpeed launch: accelerate launch"):
        engine(monkeypatch, "train.backend=zero3")
    with pytest.raises(ConfigError, match=r"backend=single, but 2 processes were started"):
        engine(monkeypatch, "train.backend=single", world=2)
    with pytest.raises(ConfigError, match=r"tensor_parallel=2 needs the backend fsdp2"):
        engine(monkeypatch, "train.tensor_parallel=2")
    with pytest.raises(
        ConfigError, match=r"no multiple of train\.micro_batch=16 on 3 data-parallel"
    ):
        accumulation(load(TINY).train, 3)
    with pytest.raises(ValueError, match=r"tensor_parallel=4 must divide the 2 processes"):
        vit22b_parallel.mesh_of("cpu", 2, 4)
    with pytest.raises(
        ValueError, match=r"tensor_parallel=5 must divide the 48 heads: one of 1, 2,"
    ):
        vit22b_parallel.check_heads(48, 5)


def test_another_models_files_are_refused_before_memory_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory"))
    other = timm.create_model("vit_22b_tiny", num_classes=10, img_size=56, depth=4)
    export(tmp_path / "weights", other)
    with pytest.raises(CheckpointError, match=r"blocks\.3\."):
        engine(monkeypatch, f"model.weights={tmp_path}/weights")
    with pytest.raises(CheckpointError, match="is neither a safetensors file nor a folder"):
        engine(monkeypatch, f"model.weights={tmp_path}")
    checkpoint = save(tmp_path, other, torch.optim.SGD(other.parameters()), {"step": 1})
    config = load(TINY)
    with pytest.raises(CheckpointError, match=r"blocks\.3\."):
        make_backend(config, 10, checkpoint)
    zeros = {"step": 1, "ranks": 2, "shapes": {"pos_embed": [1, 2, 3]}}
    (tmp_path / "state.json").write_text(json.dumps(zeros))
    with pytest.raises(CheckpointError, match="pos_embed"):
        make_backend(config, 10, tmp_path)


def test_a_card_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old card")
    with pytest.raises(ConfigError, match=r"precision=bf16: an old card has no bfloat16"):
        check_precision("bf16")
    check_precision("no")


def zero(**changes):
    settings = json.loads((RECIPE / "accelerate/zero3.json").read_text())
    settings["zero_optimization"].update(changes)
    return settings


def test_deepspeed_configurations(tmp_path, monkeypatch):
    check = check_deepspeed
    check(zero(), 10)
    with pytest.raises(ConfigError, match="stage must be 3, got 2"):
        check(zero(stage=2), 10)
    missing = {"device": "nvme", "nvme_path": str(tmp_path / "none")}
    with pytest.raises(ConfigError, match=r"offload_optimizer\.nvme_path: no such folder"):
        check(zero(offload_optimizer=missing), 10)
    there = {"device": "nvme", "nvme_path": str(tmp_path)}
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(ConfigError, match="needs libaio: apt-get install libaio-dev"):
        check(zero(offload_optimizer=there), 10)
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose: True)
    check(zero(offload_optimizer=there), 10)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="cannot be written to"):
        check(zero(offload_optimizer=there), 10)
    monkeypatch.undo()
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose: True)
    with pytest.raises(ConfigError, match=r"has .* GiB free, \d+\.\d are needed"):
        check(zero(offload_param=there), 10**15)


def test_8_bit_moments_and_zero3(tmp_path):
    """They stay on the card, and with as many ranks as wrote them."""
    away = zero(offload_optimizer={"device": "cpu"})
    with pytest.raises(ConfigError, match=r"adamw8bit steps on the card, but .*device is cpu"):
        check_deepspeed(away, 10, "adamw8bit")
    model = torch.nn.Linear(2, 3, bias=False)
    model.weight.ds_shape = model.weight.shape
    config = load(TINY, ["optim.name=adamw8bit"])
    run = types.SimpleNamespace(model=model, config=config, data_ranks=1)
    state = {"step": 3, "ranks": 2, "shapes": {"weight": [3, 2]}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"8-bit moments of 2 ranks, .* this is 1"):
        sharded_zero.load(tmp_path, run)


def test_weights_for_another_resolution_and_other_classes(tmp_path):
    def model(**options):
        return timm.create_model("vit_22b_tiny", num_classes=10, img_size=56, **options)

    source = model()
    export(tmp_path, source)
    target = model().requires_grad_(False)
    load_export(tmp_path, target)
    assert all(
        torch.equal(a, b) for a, b in zip(target.parameters(), source.parameters(), strict=True)
    )
    larger = timm.create_model("vit_22b_tiny", num_classes=3, img_size=84)
    with pytest.raises(CheckpointError, match=r"of another shape: head\.weight \(10, 64\) instead"):
        load_export(tmp_path, larger)
    load_export(tmp_path, larger, fresh_head=True)
    expected = vit22b.resampled(source.pos_embed, (4, 4), (6, 6))
    assert torch.equal(larger.pos_embed, expected)
    assert torch.equal(larger.blocks[2].out_proj.weight, source.blocks[2].out_proj.weight)
    assert torch.equal(larger.head.bias, torch.full((3,), -10.0))
    without = timm.create_model("vit_22b_tiny", num_classes=0, img_size=56)
    load_export(tmp_path, without, fresh_head=True)
    with pytest.raises(CheckpointError, match=r"missing: blocks\.3\."):
        load_export(tmp_path, model(depth=4))
    (tmp_path / "model-00002-of-00004.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="is missing or no safetensors file"):
        load_export(tmp_path, target)
