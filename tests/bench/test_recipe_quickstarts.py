"""The quickstarts of the recipes: every file is one, a killed run is noticed, and the table."""

import re

import pytest
import recipe_quickstarts
import yaml
from recipe_quickstarts import QUICKSTARTS, Quickstart
from tables.recipes import recipe_quickstarts as table

from mesa_train.utils import records


def test_every_quickstart_of_these_recipes_is_run():
    files = {(q.recipe, q.file) for q in QUICKSTARTS.values()}
    root = recipe_quickstarts.common.ROOT / "recipes"
    there = {
        (recipe, path.name)
        for recipe in ("mocov3", "lit", "decoders", "video", "distill")
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


@pytest.mark.slow
def test_a_quickstart_is_run_killed_and_resumed(tmp_path, monkeypatch):
    """A small run of the video recipe. Then a row of the killed run is changed: it is noticed."""
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
    monkeypatch.setattr(recipe_quickstarts.common, "same_weights", lambda *_: False)
    assert not recipe_quickstarts.measured(QUICKSTARTS["video"], "video", tmp_path, [])["same"]
