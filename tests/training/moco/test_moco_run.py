"""A run of MoCo v3: it continues exactly, in one process and two, and refuses what would be wrong."""

import dataclasses
import json
import os
import time
from pathlib import Path

import forked
import pytest
import torch
import yaml
from limits import HUNG_S
from safetensors.torch import load_file

from mesa_train.models.moco import LARS, MoCo
from mesa_train.training.data import sources
from mesa_train.training.mistakes import MISTAKES
from mesa_train.training.moco import fit as recipe
from mesa_train.training.moco.config import load, of_dict
from mesa_train.training.moco.run import CHECKPOINTS, build, describe, optimizer_of

REPOSITORY = Path(__file__).resolve().parents[3]
RECIPES = REPOSITORY / "recipes/mocov3"
TINY = {
    "model": {"name": "moco_vit_tiny", "dim": 8, "hidden": 32},
    "data": {"source": "digits", "image_size": 14, "crop": False, "workers": 0, "pin_memory": False},
    "views": {"crop_min": 0.5, "hflip": 0.0, "blur": 0.2},
    "optim": {"lr": 1e-3, "warmup_epochs": 0.5},
    "train": {
        "epochs": 2, "global_batch": 64, "precision": "no", "policy": "plain", "log_every": 1,
        "save_every": 2, "knn_every": 0, "device": "cpu",
    },
}  # fmt: skip


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


def config(out, **changes):
    values = json.loads(json.dumps(TINY))
    values["train"]["out"] = str(out)
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return of_dict(values)


def trained(out, **changes):
    run = recipe.prepare(config(out, **changes))
    recipe.resume(run, "")
    recipe.fit(run)
    return run


def rows(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    timed = ("images_per_s", "step_ms", "wait_ms")
    return [{k: v for k, v in row.items() if k not in timed} for row in lines]


@pytest.mark.parametrize(("policy", "cut"), [("plain", 5), ("mesa8", 2), ("mesa8", 3)])
def test_a_run_that_is_cut_continues_exactly(tmp_path, policy, cut):
    """Within an epoch, at its end, and in the next; a checkpoint comes every two steps."""
    whole = trained(tmp_path / "whole", train__policy=policy)
    run = recipe.prepare(config(tmp_path / "cut", train__policy=policy))
    step = run.step

    def interrupted(batches):
        if run.done == cut:
            raise KeyboardInterrupt
        return step(batches)

    run.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        recipe.fit(run)
    again = recipe.prepare(config(tmp_path / "cut", train__policy=policy))
    assert recipe.resume(again, "auto")
    assert 0 < again.done <= cut
    recipe.fit(again)
    assert again.done == whole.done == 6
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_the_exported_encoder_is_a_timm_model(tmp_path):
    import timm

    run = trained(tmp_path, train__epochs=1)
    weights = load_file(tmp_path / "encoder.safetensors")
    encoder = timm.create_model("moco_vit_tiny", num_classes=0, img_size=14)
    encoder.load_state_dict(weights)
    x = torch.randn(2, 3, 14, 14)
    wanted = run.model.eval().features(run.model.base_encoder, x)
    assert torch.equal(encoder.eval()(x), wanted)


def test_rates_momenta_and_what_is_reported(tmp_path):
    run = trained(tmp_path, train__knn_every=1, train__knn_images=60)
    found = rows(tmp_path)
    steps = [r for r in found if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 7))
    # 1e-3 x 64 / 256, from 0 over half an epoch of three steps.
    assert [r["lr"] for r in steps[:2]] == pytest.approx([0, 2.5e-4 * 2 / 3])
    assert steps[-1]["lr"] < 1e-4
    for row in steps:
        assert row["cross_entropy"] == pytest.approx(row["loss"] / 0.8)
        # The projection is frozen, and the first block trains.
        assert row["grad_norm.base_encoder.patch_embed"] == 0
        assert 0 < row["grad_norm.base_encoder.blocks.0"] < row["grad_norm"]
    epochs = [r for r in found if r["kind"] == "epoch"]
    assert [r["epoch"] for r in epochs] == [0, 1, 2]
    assert all(0.1 < r["knn"] <= 1 for r in epochs)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "steps 6 to 6" in describe(run)


def test_a_chunked_run_is_the_same(tmp_path):
    """Up to rounding: three chunks of a batch sum in another order.

    AdamW's first steps divide by the gradient, so one that is almost 0 moves a weight otherwise."""
    runs = [trained(tmp_path / str(c), train__chunk=c, train__epochs=1) for c in (0, 25)]
    for a, b in zip(*(r.model.parameters() for r in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-4)
    losses = [[r["loss"] for r in rows(tmp_path / str(c))] for c in (0, 25)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__global_batch": 5000}, "train.global_batch=5000 exceeds the 200 images"),
        ({"optim__warmup_epochs": 2}, "optim.warmup_epochs=2 must be fewer than train.epochs=2"),
        ({"model__name": "moco_vit_smal"}, "close names: moco_vit_small"),
        ({"model__name": "moco_vit_conv_small"}, "moco_vit_conv_small at 14 pixels: the conv stem"),
        ({"model__name": "moco_vit_conv_small", "data__image_size": 32, "train__chunk": 8},
         "has batch norms in its trunk"),
        ({"views__crop_min": 0.0}, "views.crop_min must be above 0"),
        ({"optim__name": "sgd"}, "optim.name must be one of adamw, lars, got 'sgd'"),
        ({"model__heads": 3}, "unknown key model.heads"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(changes, message, tmp_path):
    with pytest.raises(MISTAKES) as error:
        recipe.prepare(config(tmp_path / "out", **changes))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten_and_not_continued_with_other_steps(tmp_path):
    trained(tmp_path, train__epochs=1)
    for how, changes, message in (
        ("", {"train__epochs": 1}, "holds a run already: --resume auto continues it"),
        ("auto", {"train__epochs": 3}, "train.epochs=3, but"),
        ("auto", {"train__epochs": 1, "model__dim": 16}, "is of another model"),
        (str(tmp_path / "no"), {"train__epochs": 1}, "--resume: no such checkpoint"),
    ):
        run = recipe.prepare(config(tmp_path, **changes))
        with pytest.raises(MISTAKES, match=message):
            recipe.resume(run, how)


AUTHORS = {
    "mocov3_vit_small": ("adamw", 1.5e-4 * 1024 / 256, 0.1, 300, 40, 0.2, 0.99, 0.08),
    "mocov3_vit_base": ("adamw", 2.4e-3, 0.1, 300, 40, 0.2, 0.99, 0.08),
    "mocov3_vit_conv_small": ("adamw", 2.4e-3, 0.1, 300, 40, 0.2, 0.99, 0.08),
    "mocov3_vit_conv_base": ("adamw", 2.4e-3, 0.1, 300, 40, 0.2, 0.99, 0.08),
    "mocov3_resnet50_100": ("lars", 9.6, 1e-6, 100, 10, 1.0, 0.99, 0.2),
    "mocov3_resnet50_300": ("lars", 4.8, 1e-6, 300, 10, 1.0, 0.99, 0.2),
    "mocov3_resnet50_1000": ("lars", 4.8, 1.5e-6, 1000, 10, 1.0, 0.996, 0.2),
}


def test_every_configuration_is_checked_here():
    others = {
        "quickstart",
        "quickstart_linear",
        "linear",
        "finetune_vit_small",
        "finetune_vit_base",
    }
    assert {p.stem for p in RECIPES.glob("*.yaml")} == {*AUTHORS, *others}
    assert load(RECIPES / "quickstart.yaml").data.source == "scattered_digits"


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_hyperparameters(name):
    found = load(RECIPES / f"{name}.yaml")
    optim, model = found.optim, found.model
    peak = optim.lr * found.train.global_batch / 256
    values = (
        optim.name, peak, optim.weight_decay, found.train.epochs, optim.warmup_epochs,
        model.temperature, model.momentum, found.views.crop_min,
    )  # fmt: skip
    for value, wanted in zip(values, AUTHORS[name], strict=True):
        assert value == wanted or value == pytest.approx(wanted)
    resnet = "resnet" in name
    assert (model.projector_layers, model.predictor_norm) == ((2, False) if resnet else (3, True))


def test_the_heads_of_resnet50():
    found = load(RECIPES / "mocov3_resnet50_100.yaml", ["data.image_size=32", "model.hidden=64"])
    model = build(found)
    assert isinstance(model, MoCo)
    keys = list(model.state_dict())
    assert "base_encoder.fc.4.running_mean" in keys
    assert not any(k.startswith("predictor.4") for k in keys)
    assert isinstance(optimizer_of(found, model), LARS)


def script(path, *arguments, processes=1):
    path.write_text(yaml.safe_dump(TINY))
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return [*launch, RECIPES / "train.py", "--config", path, *arguments]


ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    out = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        command = script(tmp_path / "c.yaml", "--set", f"train.out={folder}", processes=processes)
        done = forked.run(command, env={**os.environ, **ENVIRONMENT}, timeout=HUNG_S)
        assert done.returncode == 0, done.stdout + done.stderr
        out.append(rows(folder))
    losses = [[r["loss"] for r in found] for found in out]
    # Sums of other lengths round otherwise.
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)


@pytest.mark.slow
def test_a_killed_process_continues_exactly(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    environment = {**os.environ, **ENVIRONMENT}
    file = tmp_path / "c.yaml"
    options = ["--set", "train.policy=mesa8"]
    done = forked.run(
        script(file, *options, "--set", f"train.out={whole}"), env=environment, timeout=HUNG_S
    )
    assert done.returncode == 0, done.stderr
    child = forked.start(script(file, *options, "--set", f"train.out={cut}"), env=environment)
    end = time.monotonic() + HUNG_S
    while not list((cut / CHECKPOINTS).glob("step-*")) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child.pid, 9)
    assert child.result(HUNG_S).returncode != 0
    done = forked.run(
        script(file, *options, "--set", f"train.out={cut}", "--resume", "auto"),
        env=environment, timeout=HUNG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "continues after step" in done.stdout
    last = [load_file(folder / CHECKPOINTS / "last/model.safetensors") for folder in (whole, cut)]
    assert all(torch.equal(value, last[1][key]) for key, value in last[0].items())


def test_the_table_of_a_dry_run_has_every_preset_and_lars_has_one_moment(monkeypatch):
    """For a model of two small blocks; the asterisk marks the run's own policy."""
    from mesa_train.training.moco import memory, run

    changes = ["data.source=digits", "data.image_size=28", "model.name=moco_vit_tiny"]
    changes += ["data.train_images=2000", "model.hidden=64", "train.global_batch=256"]
    found = load(RECIPES / "mocov3_vit_small.yaml", [*changes, "train.policy=mesa4"])
    few = ("plain", "mesa8", "mesa4", "checkpoint")
    assert set(few) < set(run.POLICIES)
    assert {f"mesa{b}{r}" for b in (8, 6, 4) for r in ("", "-recompute")} < set(run.POLICIES)
    monkeypatch.setattr(run, "POLICIES", few)
    lines = run.plan(found, 1).splitlines()
    assert "with adamw, 2 GiB" in lines[3]
    assert lines[4].split()[-8:] == ["12", "GB", "24", "GB", "48", "GB", "80", "GB"]
    table = [line.split() for line in lines[5:]]
    assert [row[0] for row in table] == list(few)
    assert [row[0] for row in table if row[-1] == "*"] == ["mesa4"]
    counts = {row[0]: [int(n.replace(",", "")) for n in row[5:9]] for row in table}
    assert all(a < b < c < d for a, b, c, d in counts.values())
    assert counts["plain"][0] < counts["mesa8"][0] < counts["mesa4"][0]

    def states(optimizer):
        held, _ = memory.counted(
            lambda: run._on_meta(found), "plain", 28, ways=("by view",), optimizer=optimizer,
            sizes=(64,),
        )["by view"]  # fmt: skip
        return held(0)

    trained = sum(p.numel() for p in build(found).parameters() if p.requires_grad)
    assert states("adamw") - states("lars") == 4 * trained


def test_one_batch_gives_nearly_the_bytes_of_three():
    """The dry run counts at one batch; scripts/bench/moco_batch.py at three."""
    from mesa_train.training.moco import memory, run

    changes = ["data.image_size=56", "model.name=moco_vit_tiny", "model.hidden=256"]
    found = load(RECIPES / "mocov3_vit_small.yaml", changes)

    def held(sizes):
        made = memory.counted(
            lambda: run._on_meta(found), "plain", 56, ways=("by view",), sizes=sizes
        )
        return made["by view"][0]

    one, three = held(run.DRY_RUN_SIZES), held(memory.SIZES)
    for batch in (64, 300, 1000, 4096, 8000):
        assert one(batch) == pytest.approx(three(batch), rel=0.12), batch
