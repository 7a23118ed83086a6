"""A run in this process: it continues exactly, accumulates exactly, keeps its best, says what is wrong."""

import json
import re
import resource
import sys

import pytest
import torch

from mesa_train.engine.wrap import report_of
from mesa_train.training import checkpoints, loop
from mesa_train.training.classification import dry_run as plan
from mesa_train.training.classification import fit as recipe
from mesa_train.training.classification.config import of_dict
from mesa_train.training.config_schema import ConfigError


def configured(out, **sections):
    values = {
        "model": {"name": "litv2_tiny", "drop_path": 0.2},
        "data": {"source": "digits", "image_size": 32, "workers": 0, "pin_memory": False},
        "augment": {"rand_augment": "", "color_jitter": 0, "hflip": 0, "scale": [0.8, 1]},
        "optim": {"lr": 1e-3, "lr_batch": 0, "warmup_epochs": 0},
        "train": {
            "epochs": 1, "global_batch": 128, "micro_batch": 64, "log_every": 1, "device": "cpu",
            "tracker": "none", "out": str(out), "precision": "no",
        },
    }  # fmt: skip
    for name, changes in sections.items():
        values[name] = values[name] | changes
    return of_dict(values)


def rows(out, kind):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


# For what does not depend on the model: a step takes a tenth of litv2_tiny's.
SMALL = {"name": "test_vit", "drop_path": 0.0}


SMALL_WITH_DROP = {"name": "test_vit", "drop_path": 0.2}


class Interrupted(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "model"), [("mesa8", {}), ("mesa4", SMALL_WITH_DROP), ("mesa6", SMALL_WITH_DROP)]
)
def test_an_interrupted_run_continues_exactly(tmp_path, policy, model):
    """Mixup, drop path, accumulation, batch norm, averaged weights: all of it. Codes below 8 bits are dithered."""
    changes = {"train": {"save_every": 4, "ema": 0.9, "policy": policy}, "model": model}
    whole = recipe.prepare(configured(tmp_path / "whole", **changes))
    recipe.resume(whole, "")
    recipe.fit(whole, 0)
    stored = [how for *_, how in report_of(whole.bare).rows]
    assert any(how.endswith("dither") for how in stored) == (policy != "mesa8")

    torch.manual_seed(123)
    cut = recipe.prepare(configured(tmp_path / "cut", **changes))
    recipe.resume(cut, "")

    def stop(result):
        if result.step == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        loop.train_epoch(cut, stop)
    torch.manual_seed(321)
    again = recipe.prepare(configured(tmp_path / "cut", **changes))
    assert recipe.resume(again, "auto")
    assert again.position.step == 4
    recipe.fit(again, 0)

    for name, value in whole.bare.state_dict().items():
        assert torch.equal(value, again.bare.state_dict()[name]), name
    for name, value in whole.ema.module.state_dict().items():
        assert torch.equal(value, again.ema.module.state_dict()[name]), name
    keys = ("train_loss", "val_loss", "top1", "top5", "ema_top1")
    ends = [rows(tmp_path / name, "epoch")[-1] for name in ("whole", "cut")]
    assert [ends[0][k] for k in keys] == [ends[1][k] for k in keys]


def test_accumulation_is_a_larger_batch(tmp_path):
    changes = {
        "model": SMALL,
        "augment": {"mixup": 0, "cutmix": 0},
    }
    found = []
    for micro in (128, 32):
        train = {"train": {"micro_batch": micro, "policy": "plain"}}
        run = recipe.prepare(configured(tmp_path, **changes, **train))
        loss, norm = run.step(run.loader.training(0, 0))
        found.append((loss.item(), norm.item()))
    # The same images in other groups: sums in another order.
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit", "lion8bit"])
# bitsandbytes says so: there is no paging between a CPU's memory and itself.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_eight_bit_optimizers_train_and_continue_exactly(tmp_path, name):
    pytest.importorskip("bitsandbytes")
    changes = {"model": SMALL, "optim": {"name": name}, "train": {"policy": "mesa8"}}
    run = recipe.prepare(configured(tmp_path, **changes))
    before = [p.detach().clone() for p in run.bare.parameters()]
    batches = run.loader.training(0, 0)
    run.step(batches)
    moved = [not torch.equal(p, q) for p, q in zip(run.bare.parameters(), before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    states = [run.optimizer.state[p] for p in run.bare.parameters()]
    kept = sum(
        v.nbytes
        for state in states
        for k, v in state.items()
        if torch.is_tensor(v) and "qmap" not in k
    )
    assert plan.memory(run.config, 10)["optimizer"] == kept
    checkpoint = run.save()
    loss, norm = run.step(batches)

    again = recipe.prepare(configured(tmp_path, **changes))
    recipe.resume(again, str(checkpoint))
    ours, our_norm = again.step(again.loader.training(0, 1))
    assert torch.equal(ours, loss)
    assert torch.equal(our_norm, norm)
    for ours, expected in zip(again.bare.parameters(), run.bare.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_a_bitsandbytes_that_cannot_is_told_before_anything_is_built(tmp_path, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")

    def step(self, closure=None):
        raise NotImplementedError("no kernel for cpu")

    monkeypatch.setattr(bnb.optim.Lion8bit, "step", step)
    with pytest.raises(ConfigError, match=r"optim\.name=lion8bit: this bitsandbytes cannot step"):
        recipe.prepare(configured(tmp_path, optim={"name": "lion8bit"}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'mesa_train\[bitsandbytes\]'"):
        recipe.prepare(configured(tmp_path, optim={"name": "adamw8bit"}))


@pytest.mark.slow
def test_what_a_run_leaves(tmp_path):
    run = recipe.prepare(configured(tmp_path, model=SMALL, train={"epochs": 2, "keep": 1}))
    recipe.resume(run, "")
    scores = recipe.fit(run, 1000)
    epochs = rows(tmp_path, "epoch")
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert [row["step"] for row in rows(tmp_path, "step")] == list(range(1, 23))
    assert epochs[-1]["top1"] == scores.top1
    assert scores.images == 360
    assert 0 < scores.top1 <= scores.top5 <= 1
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["last", "step-00000022"]
    assert (tmp_path / "checkpoints/last/model.safetensors").is_file()
    best = max(row["top1"] for row in epochs)
    assert run.position.best == best

    # The best weights, read back, score what they scored.
    weights = {"model": {**SMALL, "weights": str(tmp_path / "best.safetensors")}}
    again = recipe.prepare(configured(tmp_path / "other", **weights))
    assert again.evaluate().top1 == best
    assert recipe.load_run(tmp_path, ["train.seed=5"]).train.seed == 5


def test_averaged_weights_follow_a_short_run(tmp_path):
    """With a decay for long runs from the first step on, they would stay at the start."""
    run = recipe.prepare(configured(tmp_path, model=SMALL, train={"ema": 0.9998}))
    flat = lambda model: torch.cat([p.detach().flatten() for p in model.parameters()])  # noqa: E731
    start, batches = flat(run.bare), run.loader.training(0, 0)
    run.step(batches)
    assert torch.equal(flat(run.ema.module), flat(run.bare))
    for _ in range(4):
        run.step(batches)
    behind = (flat(run.bare) - flat(run.ema.module)).norm()
    assert 0 < behind < 0.6 * (flat(run.bare) - start).norm()


@pytest.mark.slow
def test_weights_and_biases_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "there"))
    (tmp_path / "there").mkdir()
    run = recipe.prepare(configured(tmp_path / "run", train={"tracker": "wandb"}))
    recipe.fit(run, 0)
    found = list((tmp_path / "there/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(found) == 1
    assert found[0].stat().st_size > 1000


def test_a_folder_is_not_overwritten_nor_continued_as_something_else(tmp_path):
    run = recipe.prepare(configured(tmp_path))
    run.save()
    with pytest.raises(ConfigError, match="holds a run already: --resume auto continues it"):
        recipe.resume(run, "")
    other = recipe.prepare(configured(tmp_path, train={"seed": 1}))
    with pytest.raises(ConfigError, match=r"train\.seed=1, but .* was trained with 0"):
        recipe.resume(other, "auto")
    other = recipe.prepare(configured(tmp_path, model={"name": "test_vit"}))
    with pytest.raises(checkpoints.CheckpointError, match="is of another model"):
        recipe.resume(other, "auto")
    with pytest.raises(ConfigError, match="no such checkpoint nowhere"):
        recipe.resume(other, "nowhere")


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path):
    run = recipe.prepare(configured(tmp_path, optim={"lr": 1e9}))
    with torch.no_grad():
        next(run.bare.parameters()).fill_(torch.nan)
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan after step 1; a lower optim\.lr"
    ):
        loop.train_epoch(run, lambda result: None)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "litv2_tyni"}}, r"no model 'litv2_tyni'; litv2_tiny"),
        (
            {"data": {"image_size": 28}},
            r"litv2_tiny cannot take data\.image_size=28: .*at least 29x29",
        ),
        ({"model": {"classes": 7}}, r"model\.classes=7 but digits has 10"),
        (
            {"train": {"global_batch": 96}},
            r"global_batch=96 is no multiple of train\.micro_batch=64 on 1 process; 48 would fit",
        ),
        (
            {"train": {"global_batch": 65}, "augment": {"mixup": 0.5}},
            r"global_batch=65 is no multiple of train\.micro_batch=64 on 1 process \(even",
        ),
        ({"train": {"precision": "fp16"}}, r"train\.precision=fp16 needs a GPU"),
        ({"model": {"sync_batch_norm": True}}, r"model\.sync_batch_norm: .* on GPUs only"),
        (
            {"augment": {"rand_augment": "rnad-m9"}},
            r"rand_augment='rnad-m9' is no policy of timm's",
        ),
        ({"train": {"global_batch": 6400}}, r"global_batch=6400 exceeds the 1437 images"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(tmp_path, sections, message, monkeypatch):
    # All that is ever built before is on the meta device.
    monkeypatch.setattr(recipe, "Run", None)
    with pytest.raises(ConfigError, match=message):
        recipe.prepare(configured(tmp_path, **sections))


def test_finetuning_leaves_a_head_of_other_classes_behind(tmp_path, caplog):
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("litv2_tiny", num_classes=3)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        run = recipe.prepare(configured(tmp_path, model={"weights": str(tmp_path / name)}))
        assert "head of other classes" in caplog.text
        key = "layers.2.blocks.1.mlp.fc1.weight"
        assert torch.equal(run.bare.state_dict()[key], model.state_dict()[key])
        assert run.bare.head.weight.shape == (10, 256)
    model = timm.create_model("litv2_tiny", alpha=1.0)
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=r"missing: .*h_qkv"):
        recipe.prepare(configured(tmp_path, model={"weights": str(tmp_path / "other.safetensors")}))


def test_throughput_saves_nothing(tmp_path):
    run = recipe.prepare(configured(tmp_path / "run", data={"image_size": 29}))
    found = recipe.throughput(run, warm_up=1, steps=3)
    assert found["images_per_s"] == pytest.approx(128e3 / found["step_ms"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_dry_run(tmp_path):
    text = recipe.dry_run(configured(tmp_path / "run"), 1)
    assert "batch 128 = 64 x 2 accumulated x 1 process\n" in text
    # Of four processes, each takes its 32 images at once.
    assert "batch 128 = 32 x 1 accumulated x 4 processes" in recipe.dry_run(
        configured(tmp_path / "run"), 4
    )
    assert re.search(r"group offsets +3 tensors", text)
    assert "predicted memory" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line_and_the_run_goes_on_from_the_checkpoint_before(
    tmp_path,
):
    train = {"epochs": 2, "save_every": 5, "policy": "plain", "ema": 0.9}
    run = recipe.prepare(configured(tmp_path, train=train))
    recipe.resume(run, "")

    def fill(result):
        if result.step == 6:
            # Above the weights, below AdamW's moments.
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(checkpoints.CheckpointError) as error:
            loop.train_epoch(run, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = tmp_path / "checkpoints"
    assert str(error.value).startswith(f"{folder}/step-00000010 could not be written (")
    assert str(error.value).endswith(f"; the last good checkpoint is {folder}/step-00000005")
    assert sorted(p.name for p in folder.iterdir()) == ["last", "step-00000005"]
    again = recipe.prepare(configured(tmp_path, train=train))
    assert recipe.resume(again, "auto")
    assert again.position.step == 5


def test_metrics_on_a_full_disk_name_the_checkpoint(tmp_path):
    run = recipe.prepare(configured(tmp_path, train={"policy": "plain"}))
    (tmp_path / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(
        checkpoints.CheckpointError,
        match=r"/metrics\.jsonl: Is a directory; no checkpoint is there",
    ):
        recipe.fit(run, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("position"), r"step-00000000 cannot be read, .*'position'"),
        (lambda state: state["position"].update(extra=1), r"cannot be read, .*'extra'"),
        (lambda state: state.update(images=1436), r"1437 training images, but .* trained on 1436"),
    ],
)
def test_a_checkpoint_of_another_run(tmp_path, change, message):
    run = recipe.prepare(configured(tmp_path, train={"policy": "plain"}))
    checkpoint = run.save()
    state = checkpoints.verify(checkpoint)
    change(state)
    with pytest.raises(ValueError, match=message) as error:
        run.resume(checkpoint, state)
    assert "\n" not in str(error.value)


def test_a_damaged_optimizer_state(tmp_path):
    run = recipe.prepare(configured(tmp_path, train={"policy": "plain"}))
    checkpoint = run.save()
    (checkpoint / "optimizer.bin").write_bytes(b"junk")
    with pytest.raises(
        checkpoints.CheckpointError, match=r"step-00000000 cannot be read, it is dam"
    ):
        run.resume(checkpoint, json.loads((checkpoint / "state.json").read_text()))


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_a_launcher_that_asks_for_shards_on_a_cpu_is_answered(tmp_path, monkeypatch, caplog, name):
    """Accelerate ignores DeepSpeed and FSDP there, without a word."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with caplog.at_level("WARNING", "mesa_train"):
        recipe.prepare(configured(tmp_path, model=SMALL))
    told = [r.getMessage() for r in caplog.records if r.name.startswith("mesa_train")]
    assert told == [
        f"the launcher's configuration asks for {name}, which Accelerate does not use on cpu: "
        "nothing is sharded"
    ]
