"""The open-world recipe on a small COCO folder: interrupted and continued with the same result."""

from pathlib import Path

import pytest
import torch
from open_world_folders import coco_folder

from mesa_train.training import disk
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.open_world import evaluation, fit, pictures
from mesa_train.training.open_world.config import load
from mesa_train.utils import records

QUICKSTART = Path(__file__).resolve().parents[3] / "recipes/open_world/quickstart.yaml"
SMALL = (
    *("model.box_dim=16", "model.channels=16", "model.regions=16", "model.proposals=80"),
    *("data.format=coco", "data.tasks=person, airplane; truck", "data.short_side=64"),
    *("data.long_side=64", "optim.steps=3, 2", "optim.finetune_steps=0, 1", "optim.milestones="),
    *("train.save_every=1", "train.log_every=1", "train.global_batch=2", "train.micro_batch=1"),
    *("method.start=1", "method.exemplars=3", "train.pictures=2", "train.device=cpu"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    names = ["person", "airplane", "truck", "kite"]
    train = {f"p{i:02d}": [(names[i % 3], 0), ("kite", 0), (names[i % 2], 0)] for i in range(12)}
    val = {"v": [("truck", 0), ("kite", 0), ("person", 1)], "w": [("airplane", 0)]}
    return coco_folder(tmp_path_factory.mktemp("coco"), {"train": train, "val": val})


def config(folder, out, *changes):
    return load(QUICKSTART, (*SMALL, f"data.path={folder}", f"train.out={out}", *changes))


def rows(out):
    timed = ("step_ms", "wait_ms", "images_per_s")
    return [
        {k: v for k, v in row.items() if k not in timed}
        for row in records.read(out / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_a_run_that_was_interrupted_continues_exactly(folder, tmp_path, monkeypatch):
    # Detections of a few steps have low scores; all are drawn.
    monkeypatch.setattr(pictures, "LEAST_SCORE", 0.0)
    once = fit.prepare(config(folder, tmp_path / "once"))
    evaluations = fit.fit(once)
    stages = [(row["stage"], row["energy"]) for row in evaluations]
    assert stages == [
        (stage, energy)
        for stage in ("t1_train", "t2_train", "t2_ft")
        for energy in ("off", "known_tail")
    ]
    for name in ("t1_train.png", "t2_ft.png", "curves.png", "model.safetensors"):
        assert (tmp_path / "once" / name).stat().st_size > 0

    append = disk.append

    def stop(path, row):
        if row["kind"] == "step" and row["step"] == 5:
            raise KeyboardInterrupt
        append(path, row)

    monkeypatch.setattr(disk, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        fit.fit(fit.prepare(config(folder, tmp_path / "twice")))
    monkeypatch.undo()
    again = fit.prepare(config(folder, tmp_path / "twice"))
    with pytest.raises(ConfigError, match="holds a run already"):
        fit.resume(again, "")
    assert fit.resume(again, "auto")
    assert again.done == 4
    fit.fit(again)
    assert rows(tmp_path / "twice") == rows(tmp_path / "once")
    for name, value in once.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name].nan_to_num(), value.nan_to_num()), name
    other = fit.prepare(config(folder, tmp_path / "twice", "optim.milestones=1; 1"))
    with pytest.raises(ConfigError, match="milestones"):
        fit.resume(other, "auto")

    weights, last = tmp_path / "once/model.safetensors", evaluations[-1]
    found = evaluation.scores(config(folder, tmp_path / "other"), weights)
    assert {name: last[name] for name in found} == found
    own = config(folder, tmp_path / "other")
    assert evaluation.draw_folder(own, weights, folder / "val", tmp_path / "drawn") == 2
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2
    with pytest.raises(ConfigError, match="no picture"):
        evaluation.draw_folder(own, weights, tmp_path, tmp_path / "drawn")
