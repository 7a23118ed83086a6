"""The quickstarts of the recipes: every file is one, a killed run is noticed, and the table."""

import re
import shutil

import pytest
import recipe_quickstarts
import torch
import yaml
from recipe_quickstarts import QUICKSTARTS, Quickstart
from safetensors.torch import load_file, save_file
from tables.recipes import recipe_quickstarts as table

from mesa_train.utils import records


def test_every_quickstart_of_these_recipes_is_run():
    files = {(q.recipe, q.file) for q in QUICKSTARTS.values()}
    root = recipe_quickstarts.common.ROOT / "recipes"
    there = {
        (recipe, path.name)
        for recipe in ("mocov3", "lit", "decoders", "video", "distill", "dense", "open_world")
        for path in (root / recipe).glob("quickstart*.yaml")
    }
    assert there <= files
    assert all(q.config.is_file() for q in QUICKSTARTS.values())


def test_runs_with_other_settings_have_folders_of_their_own():
    folders = [recipe_quickstarts.folder_of(q, name) for name, q in QUICKSTARTS.items()]
    assert len(set(folders)) == len(folders)
    assert folders[0] == "runs/mocov3_quickstart"
    assert all(re.fullmatch(r"runs/\w+", folder) for folder in folders)


def test_an_unknown_quickstart_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"no quickstart lite; choose from mocov3; mocov3 plain"):
        recipe_quickstarts.main(only="lite", work=tmp_path, out=tmp_path / "rows.jsonl")


def row(**changes):
    values = {
        "name": "depth", "recipe": "decoders", "file": "quickstart_depth.yaml", "changes": [],
        "policy": "mesa8", "seed": 0, "epochs": 12, "steps": 720, "score": "abs_rel",
        "value": 0.0814, "curve": [[4, 0.12], [12, 0.0814]], "chance": None, "baseline": 0.35,
        "processor_s": 150.0, "killed_after": 690, "same": True,
    }  # fmt: skip
    return {**values, **changes, **records.provenance()}


def test_the_table_has_the_newest_row_and_says_if_a_resumed_run_differs():
    knn = row(name="mocov3 plain", file="quickstart.yaml", changes=["train.policy=plain"],
              policy="plain", score="knn", value=0.5, curve=[[0, 0.171], [8, 0.5]], chance=0.1,
              baseline=None, processor_s=None, same=False)  # fmt: skip
    not_killed = {k: v for k, v in knn.items() if k not in ("same", "killed_after")} | {"name": "x"}
    lines = table.render([row(value=0.9), row(), knn, not_killed]).splitlines()
    assert len(lines) == 7
    assert lines[4].endswith("| - | - |")
    assert lines[2] == (
        "| `quickstart_depth.yaml` | mesa8 | 12 | AbsRel (less is better) | 0.350 | 0.120 after 4 | "
        "0.081 | 2.5 | step 690 of 720: same |"
    )
    assert lines[3] == (
        "| `quickstart.yaml` `train.policy=plain` | plain | 12 | nearest neighbours | 10.0 % | "
        "17.1 % | 50.0 % | - | step 690 of 720: differs |"
    )


def test_the_evaluations_of_the_score_are_chosen(tmp_path):
    rows = [
        {"kind": "step", "step": 5, "loss": 1.0},
        {"kind": "evaluation", "stage": "t1_train", "energy": "off", "repetitions": "drop", "map_known": 0.2},
        {"kind": "evaluation", "stage": "t1_train", "energy": "known_tail", "repetitions": "drop", "map_known": 0.3},
        {"kind": "evaluation", "stage": "t2_train", "energy": "off", "repetitions": "drop", "map_known": None},
        {"kind": "epoch", "epoch": 1.0, "ap": 0.5},
    ]  # fmt: skip
    for entry in rows:
        records.append(tmp_path / "metrics.jsonl", entry)
    assert QUICKSTARTS["open world"].evaluations(tmp_path) == rows[1:4]
    assert QUICKSTARTS["open world"].curve(tmp_path) == rows[1:2]
    assert QUICKSTARTS["detection"].curve(tmp_path) == rows[4:]
    assert QUICKSTARTS["detection"].curve(tmp_path)[0][QUICKSTARTS["detection"].place] == 1.0


def test_weights_are_compared_bit_for_bit(tmp_path):
    """nan stands for a fit that was not made; it equals itself here."""
    values = [torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")])]
    values += [torch.tensor([1.5, float("nan")]), torch.tensor([1.0, 0.0])]
    for number, value in enumerate(values):
        folder = tmp_path / str(number) / "checkpoints/step-00000001"
        folder.mkdir(parents=True)
        save_file({"fits": value, "count": torch.tensor(3)}, folder / "model.safetensors")
    same = recipe_quickstarts.common.same_weights
    assert [same(tmp_path / "0", tmp_path / str(i)) for i in (1, 2, 3)] == [True, False, False]


def test_the_table_takes_stages_and_average_precision():
    found = row(file="quickstart.yaml", recipe="open_world", score="map_known", value=0.25, chance=0.0,
                baseline=None, epochs="t2_ft", curve=[["t1_train", 0.3], ["t2_ft", 0.25]])  # fmt: skip
    other = row(name="detection", score="ap", value=0.5, chance=0.0, baseline=None, epochs=1.6,
                curve=[[0.8, 0.4], [1.6, 0.5]])  # fmt: skip
    lines = table.render([found, other]).splitlines()
    assert "| t2_ft | mAP of known classes | 0.0 % | 30.0 % after t1_train | 25.0 % |" in lines[2]
    assert "| 1.6 | average precision of boxes | 0.0 % | 40.0 % after 0.8 | 50.0 % |" in lines[3]


SMALL = {
    "detection": {
        "data": {"train_pictures": 40, "val_pictures": 4},
        "train": {"steps": 12, "eval_every": 6, "pictures": 1},
    },
    "open world": {
        "data": {"train_pictures": 40, "val_pictures": 6},
        "method": {"start": 4, "update_every": 2, "fit_pictures": 4},
        "optim": {
            "steps": "8, 6",
            "finetune_steps": "0, 8",
            "milestones": "6; 4",
            "warmup_steps": 2,
        },
        "train": {"save_every": 6, "pictures": 1},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALL))
def test_a_dense_quickstart_is_run_killed_and_resumed(tmp_path, monkeypatch, name):
    settings = yaml.safe_load(QUICKSTARTS[name].config.read_text())
    for section, values in SMALL[name].items():
        settings[section] |= values
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(Quickstart, "config", config)
    found = recipe_quickstarts.measured(QUICKSTARTS[name], name, tmp_path, [])
    assert found["same"]
    assert found["steps"] == {"detection": 12, "open world": 22}[name]
    assert found["resumed_from"] == {"detection": 6, "open world": 18}[name]
    assert found["resumed_from"] < found["killed_after"] < found["steps"]
    assert found["epochs"] == {"detection": 1.2, "open world": "t2_ft"}[name]


@pytest.mark.slow
def test_a_quickstart_is_run_killed_and_resumed(tmp_path, monkeypatch):
    """A small run of the video recipe. Then a weight of the resumed run is changed: it is noticed."""
    settings = yaml.safe_load(QUICKSTARTS["video"].config.read_text())
    settings["data"]["clips"], settings["train"]["epochs"] = 320, 3
    # So many layers that a step takes longer than a look at the log.
    settings["probe"] |= {"layers": 6, "width": 256}
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(Quickstart, "config", config)
    found = recipe_quickstarts.measured(QUICKSTARTS["video"], "video", tmp_path, [])
    assert found["same"]
    assert (found["epochs"], found["steps"], found["resumed_from"]) == (3, 30, 20)
    assert 20 < found["killed_after"] < 30
    assert found["processor_s"] > 0
    assert [epoch for epoch, _ in found["curve"]] == [3]

    # The same resumed run again, without its processes; one weight of it differs.
    out = recipe_quickstarts.folder_of(QUICKSTARTS["video"], "video")
    parted, kept = tmp_path / f"{out}_killed", tmp_path / "kept"
    shutil.copytree(parted, kept, symlinks=True)
    file = sorted(kept.glob("checkpoints/step-*/model.safetensors"))[-1]
    weights = load_file(file)

    def resumed(*_):
        shutil.rmtree(parted)
        shutil.copytree(kept, parted, symlinks=True)

    monkeypatch.setattr(recipe_quickstarts.common, "killed", lambda *_: 25)
    monkeypatch.setattr(recipe_quickstarts.common, "run", resumed)
    for change, same in ((0.0, True), (1e-7, False)):
        name = next(k for k, v in weights.items() if v.is_floating_point())
        save_file(weights | {name: weights[name] + change}, file)
        again = recipe_quickstarts.measured(QUICKSTARTS["video"], "video", tmp_path, [])
        assert (again["killed_after"], again["same"]) == (25, same)
