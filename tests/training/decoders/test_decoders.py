"""Decoders: shapes on odd grids, folders of masks and depths, runs that continue exactly."""

import json
import os
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
import timm
import torch
import yaml
from limits import HUNG_S
from PIL import Image

import mesa_train.models  # noqa: F401
from mesa_train.training.decoders import data
from mesa_train.training.decoders.config import load, of_dict
from mesa_train.training.decoders.decoders import (
    DPT,
    LinearDepth,
    LinearSegmentation,
    UperNet,
    pyramid,
)
from mesa_train.training.decoders.features import FeatureMaps
from mesa_train.training.decoders.run import backbone, build, describe, metres_of, plan, prepare
from mesa_train.training.mistakes import MISTAKES
from mesa_train.training.recipe_command import Recipe

REPOSITORY = Path(__file__).resolve().parents[3]
RECIPE = Recipe("decoders", load, prepare, plan, describe, ("mean_iou", "abs_rel"))


def config(out, path, **changes):
    values = {
        "model": {"name": "moco_vit_tiny", "frozen": False},
        "data": {"task": "segmentation", "path": str(path), "image_size": 21, "stride": 14},
        "optim": {"lr": 2e-3, "warmup_epochs": 0},
        "train": {
            "epochs": 2, "global_batch": 4, "precision": "no", "policy": "plain", "log_every": 1,
            "save_every": 2, "device": "cpu", "out": str(out),
        },
    }  # fmt: skip
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return of_dict(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures whose left half is dark and near, with class maps and depth maps."""
    root = tmp_path_factory.mktemp("pictures")
    stream = np.random.default_rng(0)
    for split, count in (("training", 12), ("validation", 3)):
        for kind in ("images", "annotations", "depth"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            edge = int(stream.integers(10, 30))
            right = np.arange(40)[None, :].repeat(28, 0) >= edge
            pixels = np.where(right, 200, 40)[..., None] + stream.integers(0, 30, (28, 40, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"images/{split}/{i}.jpg")
            Image.fromarray((right + 1).astype(np.uint8)).save(
                root / f"annotations/{split}/{i}.png"
            )
            metres = np.where(right, 4000, 1000).astype(np.uint16)
            metres[:3] = 0
            Image.fromarray(metres).save(root / f"depth/{split}/{i}.png")
    (root / "classes.txt").write_text("left\nright\n")
    return root


MODELS = {
    "moco_vit_tiny": (35, 7),  # a grid of 5x5
    "vit_tiny_patch16_224": (48, 16),
    "vit_small_patch14_dinov2": (70, 14),  # an odd grid of 5x5
    "swin_tiny_patch4_window7_224": (64, 4),
}


@pytest.mark.parametrize("name", ["moco_vit_tiny", "vit_small_patch14_dinov2"])
@pytest.mark.parametrize("decoder", ["linear", "upernet", "dpt"])
def test_every_decoder_gives_an_output_for_every_pixel_of_an_odd_grid(name, decoder, folder):
    size, patch = MODELS[name]
    task = "depth" if decoder == "dpt" else "segmentation"
    found = config("out", folder, model__name=name, model__decoder=decoder, model__channels=8,
                   data__image_size=size, data__task=task)  # fmt: skip
    model = build(found, backbone(found), 3).eval()
    assert model.maps.patch == patch
    assert model.maps.grid == (5, 5)
    with torch.no_grad():
        output = model(torch.randn(2, 3, size, size))
    assert output.shape == (2, 1 if task == "depth" else 3, size, size)


def test_feature_maps_of_a_transformers_model_are_its_patches(tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    about = Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=70, patch_size=14,
        num_register_tokens=2,
    )  # fmt: skip
    torch.manual_seed(0)
    net = Dinov2WithRegistersModel(about).eval()
    net.save_pretrained(tmp_path)
    from mesa_train.training.evaluation.suite.frozen import load_model

    maps = FeatureMaps(load_model(str(tmp_path), None, size=70, classes=None, device="cpu"), 4)
    x = torch.randn(1, 3, 70, 42)
    with torch.no_grad():
        found = maps(x)
        wanted = net(x).last_hidden_state[:, 3:]
    assert [tuple(m.shape) for m in found] == [(1, 16, 5, 3)] * 4
    torch.testing.assert_close(found[-1].flatten(2).transpose(1, 2), wanted)


def test_a_pyramid_keeps_maps_of_several_strides():
    same = [torch.zeros(1, 2, 5, 7)] * 4
    assert [tuple(m.shape[2:]) for m in pyramid(same)] == [(20, 28), (10, 14), (5, 7), (2, 4)]
    several = [torch.zeros(1, 2, s, s) for s in (8, 4, 2, 1)]
    assert pyramid(several) is several


def test_a_frozen_backbone_gets_no_gradient_and_stays_in_eval_mode(tmp_path, folder):
    from recipe_tools import made

    run = made(RECIPE, config(tmp_path, folder, model__frozen=True, model__decoder="upernet",
                              model__channels=8, train__policy="mesa8"))  # fmt: skip
    batches = run.batches()
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.step(batches)
    moved = {k for k, v in run.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert not [key for key in moved if key.startswith("maps.")]
    assert any("auxiliary" in key for key in moved)
    assert not run.model.maps.training


def test_segmentation_learns_a_folder_and_continues_exactly(tmp_path, folder):
    from recipe_tools import continues_exactly

    def made(out):
        return config(out, folder, train__epochs=8, train__policy="mesa8", data__hflip=0.0,
                      train__evaluate_every=8)  # fmt: skip

    run = continues_exactly(RECIPE, made, tmp_path, cut=13)
    scores = run.evaluate()
    assert scores["mean_iou"] > 0.6
    assert scores["pixel_accuracy"] > 0.75


@pytest.mark.parametrize("loss", ["log1p_mse", "scale_invariant", "dinov2"])
def test_depth_learns_a_folder(tmp_path, folder, loss):
    from recipe_tools import trained

    run = trained(RECIPE, config(tmp_path, folder, data__task="depth", loss__depth=loss,
                                 train__epochs=6, train__evaluate_every=6,
                                 data__hflip=0.0))  # fmt: skip
    steps = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in steps if row["kind"] == "step"]
    assert losses[-1] < 0.6 * losses[0]
    assert {"abs_rel", "delta_1.25", "scale_invariant_log"} <= set(run.scores)


def test_answers_that_look_at_no_pixel_are_scored(tmp_path):
    """Depth falls from 4 metres in the upper half to 2 in the lower one, in every picture."""
    from recipe_tools import made

    depth = torch.full((28, 28), 4.0)
    depth[14:] = 2.0
    depth[:, :2] = 0.0  # not valid
    values = config(tmp_path, None, data__task="depth", data__source="rooms", data__pictures=8)
    run = made(RECIPE, values)
    picture = torch.zeros(3, 28, 28, dtype=torch.uint8)
    run.train_pictures = data.Pictures(lambda _: (picture, depth), 8)
    run.held_out = data.Pictures(lambda _: (picture, 1.25 * depth), 2)
    scores = run.evaluate()
    # The lower of two middle values: 2 metres for 5 and 2.5.
    assert scores["abs_rel_of_median"] == pytest.approx((0.6 + 0.2) / 2)
    assert scores["abs_rel_of_rows"] == pytest.approx((1.0 / 5 + 0.5 / 2.5) / 2)


def test_the_commonest_class_everywhere_is_scored(tmp_path, folder):
    from recipe_tools import made

    run = made(RECIPE, config(tmp_path, folder))
    label = torch.tensor([[0] * 30 + [1] * 10]).repeat(28, 1).to(torch.uint8)
    run.held_out = data.Pictures(
        lambda _: (torch.zeros(3, 28, 40, dtype=torch.uint8), label), 1, run.held_out.names
    )
    assert run.evaluate()["mean_iou_of_commonest"] == pytest.approx(0.75 / 2)


def test_a_whole_picture_is_the_crop_of_a_ratio_and_scale_of_1():
    found = config("out", None, data__task="depth", data__source="rooms", data__scale=[1.0, 1.0],
                   data__ratio=[1.0, 1.0], data__image_size=28, data__hflip=0.0)  # fmt: skip
    depth = torch.arange(28.0 * 28).view(28, 28)
    pictures = data.Pictures(lambda _: (torch.zeros(3, 28, 28, dtype=torch.uint8), depth), 1)
    crops = data.Crops(pictures, found.data, [0.5] * 3, [0.5] * 3, seed=0)
    assert torch.equal(crops[0, 0][1], depth)
    assert data._box(torch.zeros(3, 90, 90), (0.5, 0.5), (2.0, 2.0))[2:] == (45, 90)


def test_fractions_are_nested_and_at_least_one_picture(folder):
    whole = data.Pictures(lambda i: (torch.tensor(i), torch.tensor(i)), 100)
    parts = [
        {int(p.read(i)[0]) for i in range(p.count)}
        for p in (data.fraction(whole, share, 0) for share in (1 / 16, 1 / 4, 1.0))
    ]
    assert [len(p) for p in parts] == [7, 25, 100]
    assert parts[0] < parts[1] < parts[2]
    assert data.fraction(whole, 1e-6, 0).count == 1
    assert data.fraction(whole, 0.5, 1).read(0)[0] != data.fraction(whole, 0.5, 0).read(0)[0]


def test_depths_are_read_in_metres(tmp_path):
    values = np.array([[0, 1500], [65535, 20]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.array([[np.nan, 1.5]], np.float32))
    np.savez(tmp_path / "c.npz", depth=np.array([[2.0, np.inf]]))
    assert data.read_depth(tmp_path / "a.png", 0.001).tolist() == [
        pytest.approx([0, 1.5]), pytest.approx([65.535, 0.02])
    ]  # fmt: skip
    assert data.read_depth(tmp_path / "b.npy", 1.0).tolist() == [[0.0, 1.5]]
    assert data.read_depth(tmp_path / "c.npz", 1.0).tolist() == [[2.0, 0.0]]
    z = torch.tensor([0.0, 1.0])
    assert metres_of(z).tolist() == pytest.approx([1e-3, np.e - 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__image_size": 20}, "data.image_size=20 must be a multiple of the patch of moco_vit_tiny, 7"),
        ({"model__decoder": "dpt"}, "model.decoder=dpt is not for data.task=segmentation"),
        ({"data__source": "motorcycle"}, "data.source=motorcycle is not for data.task=segmentation"),
        ({"data__source": "rooms"}, "data.source=rooms is not for data.task=segmentation; take folder or composed"),
        ({"data__ratio": [2.0, 1.0]}, "data.ratio must be a range"),
        ({"data__path": "no/such"}, "data.path: no such folder no/such"),
        ({"data__classes": 3}, "classes.txt has 2 names"),
        ({"data__val_split": "test"}, "test"),
        ({"data__zero_ignored": False}, "has the value 2"),
        ({"data__fraction": 0.0}, "data.fraction must be above 0"),
        ({"data__class_share": 0.0}, "data.class_share must be above 0"),
        ({"optim__name": "adam"}, "optim.name must be one of adamw, sgd"),
        ({"model__name": "vit_22b_tiny", "model__decoder": "upernet", "data__image_size": 28},
         "model.name=vit_22b_tiny has 3 blocks, and model.decoder reads the maps of 4; take"),
        ({"model__decoder": "upernet", "train__global_batch": 1}, "at least 2 crops in each process"),
    ],
)  # fmt: skip
def test_decoder_mistakes_are_one_line(changes, message, tmp_path, folder):
    from recipe_tools import trained

    with pytest.raises(MISTAKES) as error:
        trained(RECIPE, config(tmp_path / "out", changes.pop("data__path", folder), **changes))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_wrong_depth_folder_is_refused_in_one_line(tmp_path, folder):
    (tmp_path / "images/training").mkdir(parents=True)
    found = config(tmp_path / "out", tmp_path, data__task="depth")
    with pytest.raises(MISTAKES, match=r"there is no folder .*depth/training"):
        data.load(found.data)
    (tmp_path / "depth/training").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images/training/a.jpg")
    with pytest.raises(MISTAKES, match=r"a.jpg has no depth map .*a.png"):
        data.load(found.data)
    Image.new("RGB", (8, 8)).save(tmp_path / "depth/training/a.png")
    with pytest.raises(MISTAKES, match=r"must be a depth map of one channel"):
        data.read_depth(tmp_path / "depth/training/a.png", 1.0)


def test_the_decoder_files_are_configurations():
    files = sorted((REPOSITORY / "recipes/decoders").glob("quickstart*.yaml"))
    assert [load(f).data.task for f in files] == ["depth", "segmentation"]


def test_the_ade20k_files_have_the_values_of_the_protocols(tmp_path):
    """160,000 steps each: 64 epochs of 20,210 pictures by 8, 126 by 16."""
    linear, upernet = (
        load(REPOSITORY / f"recipes/decoders/ade20k_{name}.yaml", [f"data.path={tmp_path}"])
        for name in ("linear", "upernet")
    )
    for found in (linear, upernet):
        assert (found.data.classes, found.data.zero_ignored, found.data.class_share) == (
            150,
            True,
            0.75,
        )
        steps = 20_210 // found.train.global_batch * found.train.epochs
        assert steps == pytest.approx(160_000, rel=0.02)
    assert (linear.optim.name, linear.optim.schedule, linear.optim.lr) == ("sgd", "poly", 1e-3)
    assert linear.optim.weight_decay == 0
    assert (upernet.optim.name, upernet.optim.lr, upernet.model.aux_weight) == ("adamw", 6e-5, 0.4)


def test_sgd_with_a_polynomial_schedule_ends_at_a_hundredth(tmp_path, folder):
    from recipe_tools import made

    run = made(RECIPE, config(tmp_path, folder, optim__name="sgd", optim__schedule="poly",
                              optim__lr=0.1, optim__weight_decay=0.0))  # fmt: skip
    assert isinstance(run.optimizer, torch.optim.SGD)
    assert {g["momentum"] for g in run.optimizer.param_groups} == {0.9}
    assert run.cadence.steps == 6
    assert [run.rate(0), run.rate(3), run.rate(6)] == pytest.approx(
        [0.1, 0.1 * (0.01 + 0.99 * 0.5**0.9), 0.001]
    )
    run.step(run.batches())
    assert run.lr == 0.1


def test_no_class_takes_more_than_its_share_of_a_crop():
    """A picture that is class 0 but for its left quarter: most crops have class 0 alone."""
    label = torch.zeros(60, 60, dtype=torch.uint8)
    label[:, :14] = 1
    label[:5] = data.IGNORED
    pictures = data.Pictures(lambda _: (torch.zeros(3, 60, 60, dtype=torch.uint8), label), 1)

    def largest(share):
        found = config(
            "out", ".", data__class_share=share, data__scale=[0.05, 0.3], data__hflip=0.0
        )
        crops = data.Crops(pictures, found.data, [0.5] * 3, [0.5] * 3, seed=0)
        labels = [crops[epoch, 0][1] for epoch in range(40)]
        counts = [x[x != data.IGNORED].long().bincount() for x in labels]
        return [float(c.max() / c.sum()) for c in counts]

    free, kept = largest(1.0), largest(0.75)
    # After ten tries a crop is taken as it is, and resizing moves its share a little.
    assert sum(share <= 0.8 for share in free) < 15
    assert sum(share <= 0.8 for share in kept) > 30


def test_distortion_changes_colours_and_no_place(folder):
    made = [
        data.Crops(data.load(c.data)[0], c.data, [0.5] * 3, [0.5] * 3, seed=0)
        for c in (config("out", folder, data__distortion=on) for on in (False, True))
    ]
    pairs = [(made[0][e, 0], made[1][e, 0]) for e in range(6)]
    assert all(torch.equal(plain[1], changed[1]) for plain, changed in pairs)
    moved = [(plain[0] - changed[0]).abs().mean() for plain, changed in pairs]
    assert 0.01 < max(moved) < 1
    assert torch.equal(made[1][2, 0][0], made[1][2, 0][0])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linear", "upernet", "depth"])
def test_two_processes_train_as_one(tmp_path, folder, case):
    """The crops of a step differ in their labelled pixels, so a mean of means would differ."""
    changes = {
        "linear": {"model__frozen": True},
        "upernet": {"model__decoder": "upernet", "model__channels": 8},
        "depth": {"data__task": "depth"},
    }[case]
    own, name = folder, "linear"
    if case != "depth":
        own, name = tmp_path / "pictures", case
        shutil.copytree(folder, own)
        for i in range(0, 12, 2):  # half of the pictures have few labels
            path = own / f"annotations/training/{i}.png"
            label = np.array(Image.open(path))
            label[4:] = 0
            Image.fromarray(label).save(path)
    found = []
    for processes in (1, 2):
        values = config(tmp_path / str(processes), own, **changes).to_dict()
        assert values["model"]["decoder"] == name
        file = tmp_path / f"{processes}.yaml"
        file.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
        script = [REPOSITORY / "recipes/decoders/train.py", "--config", file]
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = forked.run((launch if processes == 2 else []) + script, env=env, timeout=HUNG_S)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / f"{processes}/metrics.jsonl").read_text().splitlines()
        rows = list(map(json.loads, lines))
        score = "abs_rel" if case == "depth" else "mean_iou"
        found.append([
            [(r["loss"], r["grad_norm"]) for r in rows if r["kind"] == "step"],
            [r[score] for r in rows if r["kind"] == "epoch"],
        ])  # fmt: skip
    (steps, scores), (steps_of_two, scores_of_two) = found
    assert len(steps) == 6
    for one, two in zip(steps, steps_of_two, strict=True):
        assert two == pytest.approx(one, rel=2e-3)
    assert scores_of_two == pytest.approx(scores, abs=5e-3)


def test_the_linear_decoder_of_22b_has_the_published_size():
    """0.9 million parameters on ADE20K: 6144 x 150 + 150."""
    count = sum(p.numel() for p in LinearSegmentation([6144], 150).parameters())
    assert count == 6144 * 150 + 150


def test_gradients_reach_every_parameter():
    maps = [torch.randn(2, 8, 5, 5, requires_grad=True) for _ in range(4)]
    for decoder in (LinearDepth([8] * 4), DPT([8] * 4, 8), UperNet([8] * 4, 3, 8, True)):
        output = decoder.train()(maps)
        total = sum(x.square().sum() for x in (output if isinstance(output, tuple) else (output,)))
        total.backward()
        lacking = [name for name, p in decoder.named_parameters() if p.grad is None]
        # DPT's first fusion has no map to add.
        assert not [name for name in lacking if "fusion_stage.layers.0.residual_layer1" not in name]


def test_swin_gives_maps_of_four_strides():
    net = timm.create_model("swin_tiny_patch4_window7_224", img_size=224, depths=(1, 1, 1, 1))
    from mesa_train.training.evaluation.suite.frozen import FrozenModel

    frozen = FrozenModel("swin", net.eval(), None, 224, (0.5,) * 3, (0.5,) * 3, "bicubic", 3, "")
    maps = FeatureMaps(frozen, 4)
    assert maps.channels == [96, 192, 384, 768]
    assert maps.grid == (7, 7)


def test_a_resnet_gives_the_strides_4_to_32():
    """timm's ResNet has a stem of stride 2 as a fifth stage."""
    net = timm.create_model("resnet10t", num_classes=0)
    from mesa_train.training.evaluation.suite.frozen import FrozenModel

    frozen = FrozenModel("resnet", net.eval(), None, 64, (0.5,) * 3, (0.5,) * 3, "bicubic", 3, "")
    maps = FeatureMaps(frozen, 4)
    with torch.no_grad():
        found = maps(torch.zeros(1, 3, 64, 64))
    assert [64 // m.shape[2] for m in found] == [4, 8, 16, 32]
    assert len(FeatureMaps(frozen, 1).channels) == 1


def test_a_model_of_fewer_blocks_than_maps_is_refused_by_its_name(tmp_path):
    from transformers import ViTConfig, ViTModel

    from mesa_train.training.evaluation.suite.frozen import load_model

    about = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                      intermediate_size=16, image_size=28, patch_size=14)  # fmt: skip
    ViTModel(about).save_pretrained(tmp_path)
    net = load_model(str(tmp_path), None, size=28, classes=None, device="cpu")
    with pytest.raises(MISTAKES, match=rf"model.name={tmp_path} has 3 blocks"):
        FeatureMaps(net, 4)
    assert FeatureMaps(net, 1).grid == (2, 2)
