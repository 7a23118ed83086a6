"""Distillation: a teacher computed or stored gives the same training, for any batch and number of processes."""

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import forked
import pytest
import timm
import torch
import yaml
from limits import HUNG_S
from safetensors.torch import save_file

import mesa_train.models  # noqa: F401
from mesa_train.training import evaluation as metrics
from mesa_train.training.classification import fit as recipe
from mesa_train.training.classification.config import load, of_dict
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import sources
from mesa_train.training.distill.config import DistillConfig
from mesa_train.training.distill.store import Store
from mesa_train.training.distill.teacher import Teacher
from mesa_train.training.mistakes import MISTAKES
from mesa_train.utils import records

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    """97 training images: three steps of 32 an epoch, and one image without a partner."""
    whole = sources.load

    def few(*arguments):
        found = whole(*arguments)
        return dataclasses.replace(
            found, train=dataclasses.replace(found.train, count=97),
            val=dataclasses.replace(found.val, count=41),
        )  # fmt: skip

    monkeypatch.setattr(sources, "load", few)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(1)
    net = timm.create_model("moco_vit_tiny", num_classes=10, img_size=14)
    torch.nn.init.normal_(net.head.weight, std=0.5)
    path = tmp_path_factory.mktemp("teacher") / "weights.safetensors"
    save_file(net.state_dict(), path)
    return path


def config(out, weights, *, micro=32, epochs=2, **distill):
    return of_dict({
        "model": {"name": "moco_vit_tiny", "drop_path": 0.0},
        "data": {"source": "digits", "image_size": 14, "crop": False, "workers": 0, "pin_memory": False},
        "augment": {
            "scale": [0.7, 1.0], "rand_augment": "", "color_jitter": 0.2, "mixup": 1.0, "cutmix": 0,
            "hflip": 0.0,
        },
        "optim": {"lr": 1e-3, "lr_batch": 0, "warmup_epochs": 0},
        "train": {
            "epochs": epochs, "global_batch": 32, "micro_batch": micro, "log_every": 1,
            "device": "cpu", "tracker": "none", "out": str(out), "precision": "no", "policy": "plain",
        },
        "method": {"name": "distill"},
        "distill": {"teacher": "moco_vit_tiny", "weights": str(weights), **distill},
    })  # fmt: skip


def trained(*arguments, **options):
    run = recipe.prepare(config(*arguments, **options))
    recipe.resume(run, "")
    recipe.fit(run, 0)
    return run


def losses(out):
    return [row["loss"] for row in records.read(out / "metrics.jsonl") if row["kind"] == "step"]


def test_stored_outputs_train_as_computed_ones(tmp_path, weights):
    """In the first pass over the draws; logits are kept in float16."""
    trained(tmp_path / "computed", weights)
    trained(tmp_path / "stored", weights, draws=2, top=0)
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "computed"), rel=2e-3)
    first, *_, last = losses(tmp_path / "computed")
    assert last < first


def test_a_store_serves_students_of_another_batch_and_is_not_made_twice(tmp_path, weights):
    store = str(tmp_path / "store")
    trained(tmp_path / "a", weights, draws=1, top=0, store=store, epochs=1)
    stamps = {p.name: p.stat().st_mtime_ns for p in Path(store).iterdir()}
    run = trained(tmp_path / "b", weights, draws=1, top=0, store=store, epochs=1, micro=16)
    assert run.plan.accumulation == 2
    assert run.method._teacher is None  # it has left the device
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-3)
    assert {p.name: p.stat().st_mtime_ns for p in Path(store).iterdir()} == stamps


def test_mixed_images_do_not_depend_on_the_batch(tmp_path, weights):
    run = recipe.prepare(config(tmp_path, weights))
    x = torch.rand(12, 3, 14, 14)
    whole = run.method.mixed(x, 3, 20)
    parts = [run.method.mixed(part, 3, 20 + 4 * i) for i, part in enumerate(x.split(4))]
    assert torch.equal(whole, torch.cat(parts))
    # Each is a mean of its pair, the larger share is its own, and shares differ.
    shares = []
    for i in range(0, 12, 2):
        gap = x[i] - x[i + 1]
        a = ((whole[i] - x[i + 1]) * gap).sum() / gap.square().sum()
        torch.testing.assert_close(whole[i], a * x[i] + (1 - a) * x[i + 1])
        torch.testing.assert_close(whole[i + 1], a * x[i + 1] + (1 - a) * x[i])
        shares.append(a.item())
    assert 0.5 <= min(shares) < 0.9
    assert len({round(share, 4) for share in shares}) == 6
    assert not torch.equal(run.method.mixed(x, 4, 20), whole)
    assert torch.equal(run.method.mixed(x[:3], 3, 20)[2], x[2])


def test_the_labels_are_not_used_and_agreement_is_reported(tmp_path, weights, monkeypatch):
    run = recipe.prepare(config(tmp_path, weights))
    images, labels, _ = next(run.batches())
    targets = run.inputs(images, labels)[1]
    state = torch.get_rng_state()
    one = run.loss(images, targets)
    torch.set_rng_state(state)
    assert torch.equal(one, run.loss(images, (targets + 1) % 10))
    run.bare.load_state_dict(run.method.teacher(run).model.state_dict())
    found = run.method.scores(run)
    assert found["val_agree1"] == found["train_agree1"] == found["val_agree5"] == 1
    assert found["val_kl"] == pytest.approx(0, abs=1e-5)
    # The teacher's answers are known from here on.
    monkeypatch.setattr(Teacher, "__call__", None)
    assert run.method.scores(run) == pytest.approx(found, abs=1e-5)


def test_the_loss_of_the_best_classes():
    torch.manual_seed(0)
    s, t = torch.randn(5, 40, dtype=torch.float64), 3 * torch.randn(5, 40, dtype=torch.float64)
    for temperature in (1.0, 4.0):
        best = (t / temperature).softmax(1).topk(39, 1)
        rest = 1 - best.values.sum(1, keepdim=True)
        found = metrics.top_distillation_loss(
            s, best.indices, torch.cat([best.values, rest], 1), temperature
        )
        # One class is the rest, so nothing is lost.
        wanted = metrics.distillation_loss(s, t, temperature)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
        few = torch.cat([best.values[:, :4], 1 - best.values[:, :4].sum(1, keepdim=True)], 1)
        less = metrics.top_distillation_loss(s, best.indices[:, :4], few, temperature)
        assert 0 < less < wanted


def test_a_store_of_the_best_classes(tmp_path):
    torch.manual_seed(0)
    logits = 3 * torch.randn(20, 1000)
    store = Store(tmp_path, {}, 20, 1000, top=16, temperature=2.0)
    assert store.write(
        0, 0, lambda positions: iter(logits[positions.start : positions.stop].split(7))
    )
    rows = store.read(0, range(3, 17))
    best = (logits[3:17] / 2).softmax(1).topk(16, 1)
    assert torch.equal(rows[:, :16].long(), best.indices)
    torch.testing.assert_close(rows[:, 16:32], best.values, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(rows[:, 16:].sum(1), torch.ones(14), rtol=1e-3, atol=0)
    assert Store.bytes_of(1, 1000, 16) == 66
    assert Store.bytes_of(1, 1000, 0) == 2000


@pytest.mark.parametrize(("bits", "least", "error"), [("8", 0.3, 0.05), ("4", 0.2, 0.5)])
def test_a_teacher_in_few_bits_gives_close_logits(weights, bits, least, error):
    pytest.importorskip("bitsandbytes")
    x = torch.randn(6, 3, 14, 14)
    device = torch.device("cpu")
    whole, few = (
        Teacher(DistillConfig("moco_vit_tiny", str(weights), bits=b), 10, 14, device)
        for b in ("16", bits)
    )
    assert few.bytes < (least + 0.1) * whole.bytes
    gap = (few(x) - whole(x)).norm() / whole(x).norm()
    assert 0 < gap < error


def test_the_teacher_sees_its_own_size_and_normalisation(weights, tmp_path):
    """A transformers folder of one channel and another size, in its own normalisation."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    about = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=28, patch_size=14, num_labels=10, num_channels=1,
    )  # fmt: skip
    model = ViTForImageClassification(about).eval()
    model.save_pretrained(tmp_path)
    grey = {"image_mean": [0.3], "image_std": [0.2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(grey))
    teacher = Teacher(DistillConfig(str(tmp_path), image_size=28), 10, 14, torch.device("cpu"))
    pixels = torch.full((2, 3, 14, 14), 0.4)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        wanted = model((torch.full((2, 1, 28, 28), 0.4) - 0.3) / 0.2).logits
    torch.testing.assert_close(teacher((pixels - mean) / std), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ""}, "distill.teacher is missing"),
        ({"teacher": "moco_vit_tin"}, "close names: moco_vit_tiny"),
        ({"weights": "no.pth"}, "distill.weights: no such file no.pth"),
        ({"weights": ""}, "distill.weights is missing"),
        ({"bits": "3"}, "distill.bits must be one of 16, 8, 4, got '3'"),
        ({"image_size": 3}, "is of another model; of another shape: pos_embed"),
        ({"loss": "sigmoid", "draws": 2}, "distill.loss=sigmoid needs distill.top=0"),
    ],
)
def test_distillation_mistakes_are_one_line(changes, message, tmp_path, weights):
    with pytest.raises(MISTAKES) as error:
        trained(tmp_path / "out", weights=changes.pop("weights", weights), **changes)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_store_of_another_run_is_refused(tmp_path, weights):
    options = {"draws": 1, "store": str(tmp_path / "store"), "epochs": 1}
    trained(tmp_path / "a", weights, **options)
    with pytest.raises(ConfigError, match=r"was made with top=16, this run has 3"):
        trained(tmp_path / "b", weights, top=3, **options)
    views = tmp_path / "store/views.safetensors"
    save_file({"pixels": torch.zeros(8, 3, 14, 14).half()}, views)
    with pytest.raises(ConfigError, match="differ from those of this machine"):
        trained(tmp_path / "c", weights, **options)


def test_the_quickstart_is_a_configuration():
    found = load(REPOSITORY / "recipes/distill/quickstart.yaml")
    assert found.method.name == "distill"
    assert found.distill.draws == 10


def test_the_baseline_differs_in_its_labels_alone():
    student, labels = (
        load(REPOSITORY / f"recipes/distill/{name}.yaml").to_dict()
        for name in ("quickstart", "quickstart_labels")
    )
    assert labels["method"]["name"] == "none"
    assert student["train"].pop("out") != labels["train"].pop("out")
    for section in ("model", "data", "augment", "optim", "train"):
        assert student[section] == labels[section], section


def test_the_file_of_imagenet_has_the_published_values():
    """Mixup of whole images, one crop for both, no other augmentation; nothing else is a default."""
    found = load(REPOSITORY / "recipes/distill/imagenet.yaml")
    assert found.method.name == "distill"
    assert (found.distill.image_size, found.data.image_size, found.distill.temperature) == (
        384,
        240,
        1,
    )
    assert (found.train.global_batch, found.optim.lr, found.optim.weight_decay) == (1024, 1e-4, 0.1)
    assert found.optim.lr_batch == 0
    augment = found.augment
    assert (augment.mixup, augment.cutmix, augment.color_jitter, augment.erase) == (1.0, 0, 0, 0)
    assert tuple(augment.scale) == (0.05, 1.0)


def test_a_dry_run_names_the_teacher(tmp_path, weights):
    text = recipe.dry_run(config(tmp_path, weights, bits="4", draws=3, top=4), 1)
    assert "teacher moco_vit_tiny: " in text
    assert "3 draws of 1.7 KiB" in text


@pytest.mark.slow
def test_two_processes_label_and_train_as_one_and_a_killed_one_goes_on(tmp_path, weights):
    """Killed by SIGKILL after its first checkpoint; the store that two processes made serves one."""
    values = config(tmp_path / "x", weights, draws=2, top=0, epochs=2).to_dict()
    values["train"] |= {"save_every": 1, "policy": "mesa8"}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    script = [REPOSITORY / "recipes/distill/train.py", "--config", tmp_path / "c.yaml"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))

    def options(name):
        return [
            "--set",
            f"train.out={tmp_path / name}",
            "--set",
            f"distill.store={tmp_path / 'store'}",
        ]

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = forked.run([*launch, *script, *options("two"), "--set", "train.micro_batch=16"],
                      env=environment, timeout=HUNG_S)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    done = forked.run([*script, *options("one")], env=environment, timeout=HUNG_S)
    assert done.returncode == 0, done.stdout + done.stderr
    # Two processes round other tensors and sum in another order. The difference grows with each
    # step, and how fast depends on the processor. The first steps and the last epoch's mean agree.
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 88
    assert two[:10] == pytest.approx(one[:10], rel=1e-3)
    assert statistics.fmean(two[44:]) == pytest.approx(statistics.fmean(one[44:]), rel=0.1)
    child = forked.start([*script, *options("cut")], env=environment)
    end = time.monotonic() + HUNG_S
    while not list((tmp_path / "cut/checkpoints").glob("step-*")) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child.pid, 9)
    assert child.result(HUNG_S).returncode != 0
    done = forked.run(
        [*script, *options("cut"), "--resume", "auto"], env=environment, timeout=HUNG_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continues after step" in done.stdout
    assert losses(tmp_path / "cut") == losses(tmp_path / "one")
