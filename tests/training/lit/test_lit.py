"""LiT: the loss over processes, captions from labels and files, a run that continues exactly."""

import json
import math
import os
from pathlib import Path

import forked
import pytest
import torch
import yaml
from limits import HUNG_S
from PIL import Image

from mesa_train.training import evaluation as metrics
from mesa_train.training.lit import pairs
from mesa_train.training.lit.config import LossConfig, load, of_dict
from mesa_train.training.lit.run import describe, plan, prepare
from mesa_train.training.lit.towers import TwoTowers, imagenet_names, prompts_of, tokenizer, unit
from mesa_train.training.mistakes import MISTAKES
from mesa_train.training.recipe_command import Recipe

pytest.importorskip("open_clip")
REPOSITORY = Path(__file__).resolve().parents[3]
RECIPE = Recipe("lit", load, prepare, plan, describe, ("top1",))
TINY = {
    "model": {"name": "moco_vit_tiny", "image_size": 14},
    "text": {"width": 16, "layers": 1, "heads": 2, "context": 8},
    "data": {"train": "digits", "prompts": "simple"},
    "optim": {"lr": 3e-3, "warmup_epochs": 0},
    "train": {
        "epochs": 1, "global_batch": 256, "precision": "no", "policy": "plain", "log_every": 1,
        "save_every": 2, "device": "cpu",
    },
}  # fmt: skip


def config(out, **changes):
    values = json.loads(json.dumps(TINY))
    values["train"]["out"] = str(out)
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return of_dict(values)


def towers(name):
    return TwoTowers(torch.nn.Identity(), None, LossConfig(name, temperature=10.0, bias=-3.0))


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_loss_of_one_process_is_that_of_the_arrays(name):
    torch.manual_seed(0)
    x, y = unit(torch.randn(6, 8)), unit(torch.randn(6, 8))
    if name == "softmax":
        wanted = metrics.contrastive_loss(x, y, 10.0)
    else:
        wanted = metrics.sigmoid_contrastive_loss(x, y, 10.0, -3.0)
    assert towers(name).loss(x, y).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_captions_and_prompts():
    assert [len(prompts_of(n)) for n in ("openai80", "clip_paper", "simple", "clip_best")] == [
        80,
        81,
        7,
        8,
    ]
    assert imagenet_names()[0] == "tench"
    assert pairs.class_names(["sea_lion", "cat,kitten"], None) == ("sea lion", "cat")
    found, (test,) = pairs.load(config("out").data)
    drawn = {found.caption(3, 0, epoch) for epoch in range(40)}
    name = pairs.DIGITS[int(found.images.labels[3])]
    assert 3 <= len(drawn) <= 7
    assert all(name in text for text in drawn)
    assert found.caption(3, 0, 5) == found.caption(3, 0, 5)
    assert len(test.names) == 10
    tokens = tokenizer(8)(["A photo of the SEVEN.", "a_photo of the seven"])
    assert torch.equal(tokens[0], tokens[1])


def test_a_locked_run_names_digits_and_continues_exactly(tmp_path):
    from recipe_tools import continues_exactly

    def made(out):
        return config(out, train__epochs=4, train__policy="mesa8", train__evaluate_every=4)

    run = continues_exactly(RECIPE, made, tmp_path, cut=3)
    assert run.evaluate()["top1"] > 0.2  # chance is 0.1
    table = json.loads((tmp_path / "whole/zeroshot.json").read_text())
    assert [row["prompts"] for row in table] == [
        "openai80",
        "clip_paper",
        "clip_best",
        "simple",
        "name",
    ]
    # The image tower is not part of what trains.
    assert not [key for key in run.model.state_dict() if key.startswith("image.")]
    assert len(list((tmp_path / "whole/features").glob("*"))) > 0


def test_an_unlocked_run_trains_both_towers(tmp_path):
    from recipe_tools import made

    run = made(RECIPE, config(tmp_path, model__locked=False, loss__name="sigmoid", train__global_batch=32,
                              data__crop_min=0.7, train__policy="mesa8"))  # fmt: skip
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    batches = run.batches()
    run.step(batches)
    run.step(batches)
    moved = {k for k, v in run.model.state_dict().items() if not torch.equal(v, before[k])}
    assert {"image.blocks.0.attn.qkv.weight", "log_temperature", "bias"} <= moved
    assert any(key.startswith("text.") for key in moved)


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (value, 10, 200 - value)).save(path)


def test_a_csv_of_captions_with_a_folder_for_zero_shot(tmp_path):
    from recipe_tools import trained

    lines = ["file,caption"]
    for i in range(16):
        picture(tmp_path / f"pictures/{i}.png", 12 * i)
        lines.append(f'pictures/{i}.png,"a {"red" if i > 7 else "blue"} wall, number {i}"')
        picture(tmp_path / f"test/{'red_wall' if i > 7 else 'blue_wall'}/{i}.png", 12 * i)
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    run = trained(RECIPE, config(
        tmp_path / "out", data__train=str(tmp_path / "captions.csv"),
        data__held_out=str(tmp_path / "test"), train__global_batch=8,
    ))  # fmt: skip
    assert run.sets[0].names == ("blue wall", "red wall")
    assert set(run.scores) == {"top1", "top5"}
    assert run.pairs.caption(9, 0, 3) == "a red wall, number 9"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__train": "no/such"},
            "data.train must be one of mnist5k, digits, scattered_digits, a folder or a CSV",
        ),
        ({"data__prompts": "many"}, "data.prompts must be one of openai80"),
        ({"text__heads": 3}, "text.heads=3 must divide text.width=16"),
        ({"model__name": "moco_vit_tin"}, "model.name: no model 'moco_vit_tin'"),
        ({"model__weights": "no.safetensors"}, "model.weights: no file no.safetensors"),
        ({"train__global_batch": 5000}, "train.global_batch=5000 exceeds the 1437 images"),
        ({"loss__name": "hinge"}, "loss.name must be one of softmax, sigmoid, got 'hinge'"),
    ],
)
def test_lit_mistakes_are_one_line(changes, message, tmp_path):
    from recipe_tools import made

    with pytest.raises(MISTAKES) as error:
        made(RECIPE, config(tmp_path, **changes))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,caption\na.png,x", "it lacks file"),
        ("file,caption\nno.png,x", "line 2: no file no.png"),
        ("file,caption\nc.csv, ", "line 2: the caption is empty"),
    ],
)
def test_a_wrong_csv_is_refused_in_one_line(text, message, tmp_path):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(MISTAKES, match=message):
        pairs.of_csv(tmp_path / "c.csv")


NAMES = tuple(f"class {i}" for i in range(1000))


@pytest.fixture
def imagenet_sets(tmp_path):
    """A picture of ImageNet-A, -R and ObjectNet, and two validation images."""
    for subset in ("imagenet-a", "imagenet-r", "objectnet"):
        picture(tmp_path / "sets" / subset / metrics.subset_folders(subset)[0] / "a.png", 60)
    for number in (1, 2):
        picture(tmp_path / "sets/imagenet-val" / f"ILSVRC2012_val_{number:08d}.JPEG", 90)
    return tmp_path / "sets"


@pytest.mark.parametrize("locked", [True, False])
def test_each_set_is_resized_by_its_own_rule(imagenet_sets, tmp_path, locked):
    from recipe_tools import made

    run = made(
        RECIPE, config(tmp_path / "out", model__locked=locked, data__sets=str(imagenet_sets))
    )
    run.sets = pairs.further(run.config.data, NAMES)
    seen, pixels = [], run.net.pixels

    def spy(image, squash=False, short_side=None):
        seen.append((image.size, short_side))
        return pixels(image, squash, short_side)

    run.net.pixels = spy
    for images in run.sets:
        run._features(images)
    # 14 pixels: the short side becomes 14 / 0.75 for A and ObjectNet, whose border is cropped first.
    assert [s.name for s in run.sets] == ["imagenet-a", "imagenet-r", "objectnet", "ReaL"]
    assert seen == [((20, 16), 19), ((20, 16), None), ((16, 12), 19), *[((20, 16), None)] * 2]


def test_any_of_the_labels_of_real_is_right(imagenet_sets, monkeypatch):
    from mesa_train.training.evaluation import label_subsets

    monkeypatch.setattr(label_subsets, "real_labels", lambda: ((3, 7), ()))
    found = config("out", data__sets=str(imagenet_sets)).data
    (real,) = [s for s in pairs.further(found, NAMES) if s.name == "ReaL"]
    assert len(real) == 1  # an image without a label does not count
    assert real.hits(torch.tensor([[7, 0], [1, 2]])).tolist() == [[True, False]]
    assert real.hits(torch.tensor([[5, 3], [1, 2]])).tolist() == [[False, True]]
    assert len(real.names) == 1000


def test_the_lit_files_are_configurations():
    files = sorted((REPOSITORY / "recipes/lit").glob("quickstart*.yaml"))
    assert [load(f).model.locked for f in files] == [True, False]


def test_the_file_of_captions_has_the_values_of_the_demonstration(tmp_path):
    (tmp_path / "captions.csv").touch()
    there = [f"data.train={tmp_path / 'captions.csv'}", f"data.held_out={tmp_path}",
             f"data.sets={tmp_path}"]  # fmt: skip
    found = load(REPOSITORY / "recipes/lit/captions.yaml", there)
    assert (found.text.width, found.text.layers, found.text.context) == (512, 12, 16)
    assert (found.train.global_batch, found.optim.lr, found.loss.temperature) == (4096, 1e-3, 10)
    assert 591_753 // 4096 * found.train.epochs == pytest.approx(5000, rel=0.02)


@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path):
    """The loss compares pairs of both processes, so a loss of halves would be log(2) lower."""
    found = []
    for processes in (1, 2):
        values = json.loads(json.dumps(TINY))
        values["train"] |= {"out": str(tmp_path / str(processes)), "epochs": 2}
        file = tmp_path / f"{processes}.yaml"
        file.write_text(yaml.safe_dump(values))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
        script = [REPOSITORY / "recipes/lit/train.py", "--config", file]
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = forked.run((launch if processes == 2 else []) + script, env=env, timeout=HUNG_S)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / f"{processes}/metrics.jsonl").read_text().splitlines()
        steps = [r for r in map(json.loads, lines) if r["kind"] == "step"]
        found.append([(r["loss"], r["grad_norm"]) for r in steps])
    for one, two in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=2e-3)
    assert found[0][0][0] > math.log(256) - 1
