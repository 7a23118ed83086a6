"""Fine-tuning of ViT-22B's siblings: SGD, a cosine, softmax, averaged weights."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from test_vit22b_mistakes import RECIPE, TINY, zero
from test_vit22b_sharded import accelerate, losses, settings

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.vit22b import dry_run
from mesa_train.training.vit22b import loop as sharded_loop
from mesa_train.training.vit22b.config import load
from mesa_train.training.vit22b.schedule import Cosine, schedule_of
from mesa_train.training.vit22b.zero3 import check_deepspeed

OF_FILE = load(RECIPE / "finetune.yaml")
OPTIM = ["name=sgd", "schedule=cosine", "loss=softmax", "lr=0.01", "weight_decay=0", "head_decay=0"]
CHANGES = [f"optim.{change}" for change in OPTIM] + ["model.head_bias=0", "train.ema=0.6"]


def trained(out, *changes):
    rows = []
    sets = settings(out, policy="plain", precision="no")[1::2]
    engine = sharded_loop.train(load(TINY, [*sets, *CHANGES, *changes]), rows.append)
    return engine, rows


def test_the_cosine_rises_and_falls_to_0():
    schedule = Cosine(0.03, 500, 20_000)
    assert schedule(0) == 0
    assert schedule(250) == pytest.approx(0.015)
    assert schedule(500) == 0.03
    assert schedule(10_250) == pytest.approx(0.015)
    assert schedule(20_000) == schedule(30_000) == pytest.approx(0, abs=1e-15)
    assert Cosine(1.0, 0, 4)(0) == 1
    with pytest.raises(ValueError, match="warmup=5 must be at least 0 and below the 5 steps"):
        Cosine(1.0, 5, 5)


def test_the_values_of_the_file():
    optim, train = OF_FILE.optim, OF_FILE.train
    assert (optim.name, optim.momentum, optim.lr, optim.clip) == ("sgd", 0.9, 0.03, 1.0)
    assert (optim.weight_decay, optim.head_decay, optim.warmup) == (0, 0, 500)
    assert (train.steps, train.global_batch, train.ema) == (20_000, 512, 0.9999)
    assert (OF_FILE.model.image_size, OF_FILE.model.fresh_head) == (378, True)
    assert schedule_of(OF_FILE) == Cosine(0.03, 500, 20_000)


def test_steps_are_those_of_sgd_with_momentum(tmp_path):
    """The rates, and the optimizer's momentum after a step."""
    engine, rows = trained(tmp_path / "run")
    assert isinstance(engine.optimizer, torch.optim.SGD)
    assert {g["momentum"] for g in engine.optimizer.param_groups} == {0.9}
    wanted = [0, 0.005, *(0.01 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4))]
    assert [row["lr"] for row in rows] == pytest.approx(wanted)
    # A classifier of zeros: the first loss is that of chance, of the softmax.
    assert rows[0]["loss"] == pytest.approx(math.log(10), rel=1e-4)
    assert all("momentum_buffer" in state for state in engine.optimizer.state.values())
    assert engine.average is not None


def test_the_loss_is_the_softmax():
    config = types.SimpleNamespace(optim=types.SimpleNamespace(loss="softmax", z_loss=0.0))
    run = types.SimpleNamespace(config=config)
    logits, targets = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    found = sharded_loop.ShardedRun.loss(run, logits, targets)
    assert torch.equal(found, F.cross_entropy(logits, targets))


def test_a_run_that_is_cut_continues_exactly(tmp_path):
    whole, _ = trained(tmp_path / "whole", "train.save_every=3")
    cut, rows = trained(tmp_path / "cut", f"train.resume={tmp_path / 'whole/step-00000003'}")
    assert [row["step"] for row in rows] == [4, 5, 6]
    for (name, a), b in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(whole.average.shards[name], cut.average.shards[name]), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["optim.name=sdg"], r"optim\.name must be one of adamw, adamw8bit, sgd"),
        (["optim.schedule=cos"], r"optim\.schedule must be one of rsqrt, cosine"),
        (["optim.schedule=cosine", "optim.warmup=6"], r"optim\.warmup=6 must be fewer than train\.st"),
        (["optim.loss=softmax", "optim.z_loss=0.1"], r"optim\.z_loss=0\.1 needs optim\.loss=sigmoid"),
    ],
)  # fmt: skip
def test_mistakes(changes, said):
    with pytest.raises(ConfigError, match=said):
        load(TINY, changes)


def test_zero3_refuses_sgd():
    with pytest.raises(ConfigError, match=r"optim\.name=sgd does not run under ZeRO-3"):
        check_deepspeed(zero(), 10, "sgd")


def test_a_dry_run_counts_one_moment():
    adamw = dry_run.predict(load(TINY), 1).states
    sgd = dry_run.predict(load(TINY, ["optim.name=sgd"]), 1).states
    assert 2 * sgd.optimizer == adamw.optimizer > 0


@pytest.mark.slow
def test_two_processes_under_fsdp2_train_as_one(tmp_path):
    _, rows = trained(tmp_path / "single")
    given = settings(tmp_path / "two", policy="plain", precision="no")
    accelerate("fsdp2", *given, *(part for change in CHANGES for part in ("--set", change)))
    assert losses(tmp_path / "two") == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert (tmp_path / "two/weights_averaged").is_dir()
