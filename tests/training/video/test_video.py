"""The video probe: order of frames, folders of clips, a run that continues exactly."""

import json
import os
from pathlib import Path

import forked
import pytest
import torch
import yaml
from limits import HUNG_S
from PIL import Image

from mesa_train.training.mistakes import MISTAKES
from mesa_train.training.recipe_command import Recipe
from mesa_train.training.video import clips
from mesa_train.training.video.config import ProbeConfig, load, of_dict
from mesa_train.training.video.run import TemporalProbe, describe, plan, prepare

REPOSITORY = Path(__file__).resolve().parents[3]
RECIPE = Recipe("video", load, prepare, plan, describe, ("top1",))


def config(out, path, **changes):
    values = {
        "model": {"name": "moco_vit_tiny", "image_size": 14},
        "probe": {"layers": 1, "width": 16, "heads": 2, "dropout": 0.1},
        "data": {"path": str(path), "frames": 4},
        "optim": {"lr": 3e-3, "warmup_epochs": 0},
        "train": {
            "epochs": 3, "global_batch": 4, "precision": "no", "policy": "mesa8", "log_every": 1,
            "save_every": 2, "device": "cpu", "out": str(out),
        },
    }  # fmt: skip
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return of_dict(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of frames that grow brighter, or darker: the frames are the same in another order."""
    root = tmp_path_factory.mktemp("clips")
    for split, count in (("train", 8), ("validation", 3)):
        for name, step in (("brighter", 1), ("darker", -1)):
            for clip in range(count):
                path = root / split / name / f"clip{clip}"
                path.mkdir(parents=True)
                levels = range(10 + 4 * clip, 210 + 4 * clip, 25)
                for t, level in enumerate(list(levels)[::step]):
                    Image.new("RGB", (14, 14), (level,) * 3).save(path / f"{t:04d}.png")
    return root


def test_a_probe_sees_order_and_a_mean_does_not():
    torch.manual_seed(0)
    x = torch.randn(3, 6, 8)
    for layers, same in ((0, True), (2, False)):
        probe = TemporalProbe(8, 6, 5, ProbeConfig(layers, None, 2, 0.0)).eval()
        assert probe(x).shape == (3, 5)
        assert torch.allclose(probe(x), probe(x.flip(1)), atol=1e-5) == same


def test_a_run_learns_the_order_of_frames_and_continues_exactly(tmp_path, folder):
    from recipe_tools import continues_exactly

    def made(out):
        return config(out, folder, train__epochs=8)

    run = continues_exactly(RECIPE, made, tmp_path, cut=13)
    assert run.evaluate()["top1"] == 1
    # The features are kept: the frames are not read again.
    assert list((tmp_path / "whole/features").rglob("*"))


def test_frames_are_the_middles_of_equal_parts():
    assert clips.positions(8, 8) == list(range(8))
    assert clips.positions(100, 4) == [12, 37, 62, 87]
    assert clips.positions(2, 4) == [0, 0, 1, 1]


def test_digits_move_in_the_direction_of_their_label():
    import numpy as np

    found = clips.moving_digits(8, 5, held_out=False)

    def middle(number):
        ink = np.asarray(found.frames.read(number).convert("L")).astype(float)
        rows, columns = np.indices(ink.shape)
        return (columns * ink).sum() / ink.sum(), (rows * ink).sum() / ink.sum()

    for clip, wanted in ((0, (1, 0)), (2, (0, 1)), (5, (-1, -1))):
        (x0, y0), (x1, y1) = middle(5 * clip), middle(5 * clip + 4)
        assert (np.sign(round((x1 - x0) / 8)), np.sign(round((y1 - y0) / 8))) == wanted
    assert len(found.frames) == 40
    assert found.frames.labels[5:10].tolist() == [1] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "no/such"}, "data.path: no such folder no/such"),
        ({"data__val_split": "test"}, "there is no folder"),
        ({"probe__heads": 3}, "probe.heads=3 must divide probe.width=16"),
        ({"model__name": "moco_vit_tin"}, "model.name: no model 'moco_vit_tin'"),
    ],
)
def test_video_mistakes_are_one_line(changes, message, tmp_path, folder):
    from recipe_tools import made

    with pytest.raises(MISTAKES) as error:
        made(RECIPE, config(tmp_path / "out", changes.pop("data__path", folder), **changes))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_clip_that_cannot_be_read_is_named(tmp_path, folder):
    for split in ("train", "validation"):
        (tmp_path / split / "a/clip").mkdir(parents=True)
    with pytest.raises(MISTAKES, match=r"the clip .*train/a/clip has no pictures"):
        clips.load(config("out", tmp_path).data)
    (tmp_path / "train/a/clip/0.jpg").write_bytes(b"no picture")
    found, _ = clips._split(tmp_path / "train", 2, None)
    with pytest.raises(MISTAKES, match=r"0.jpg cannot be decoded"):
        found.frames.read(0)


def test_a_video_file_gives_frames_at_equal_distances(tmp_path):
    av = pytest.importorskip("av")
    import numpy as np

    for split in ("train", "validation"):
        path = tmp_path / split / "a/clip.mp4"
        path.parent.mkdir(parents=True)
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=8)
            stream.width = stream.height = 32
            for level in range(0, 240, 30):
                pixels = np.full((32, 32, 3), level, np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                    file.mux(packet)
            for packet in stream.encode():
                file.mux(packet)
    train, _ = clips.load(config("out", tmp_path).data)
    levels = [np.asarray(train.frames.read(t)).mean() for t in range(4)]
    assert levels == pytest.approx([30, 90, 150, 210], abs=12)
    (tmp_path / "train/a/clip.mp4").write_bytes(b"no video")
    train, _ = clips.load(config("out", tmp_path).data)
    with pytest.raises(MISTAKES, match=r"clip.mp4 cannot be decoded"):
        train.frames.read(0)


def test_a_dry_run_counts_frames(folder, tmp_path):
    text = plan(config(tmp_path, folder), 2)
    assert "16 training and 6 held-out clips of 4 frames, 2 classes" in text
    assert "88 frames once" in text


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, folder):
    """Dropout differs between processes, so it is off."""
    found = []
    for processes in (1, 2):
        values = config(tmp_path / str(processes), folder, probe__dropout=0.0).to_dict()
        file = tmp_path / f"{processes}.yaml"
        file.write_text(yaml.safe_dump(json.loads(json.dumps(values))))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
        script = [REPOSITORY / "recipes/video/train.py", "--config", file]
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = forked.run((launch if processes == 2 else []) + script, env=env, timeout=HUNG_S)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / f"{processes}/metrics.jsonl").read_text().splitlines()
        rows = list(map(json.loads, lines))
        found.append([
            [(r["loss"], r["grad_norm"]) for r in rows if r["kind"] == "step"],
            [(r["top1"], r["top5"]) for r in rows if r["kind"] == "epoch"],
        ])  # fmt: skip
    (steps, scores), (steps_of_two, scores_of_two) = found
    assert len(steps) == 12
    for one, two in zip(steps, steps_of_two, strict=True):
        assert two == pytest.approx(one, rel=5e-3)
    assert scores_of_two == scores


def test_the_video_file_is_a_configuration():
    assert load(REPOSITORY / "recipes/video/quickstart.yaml").data.source == "moving_digits"
    assert json.dumps(load(REPOSITORY / "recipes/video/quickstart.yaml").to_dict())
