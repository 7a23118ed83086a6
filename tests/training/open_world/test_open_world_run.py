"""The open-world recipe on a small COCO folder: interrupted and continued with the same result."""

import json
import shutil
from pathlib import Path

import forked
import pytest
import torch
from limits import HUNG_S
from open_world_folders import coco_folder

from mesa_train.measure.footprint import footprint
from mesa_train.training import disk
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.open_world import dry_run, evaluation, fit, pictures
from mesa_train.training.open_world.config import load
from mesa_train.utils import records

RECIPE = Path(__file__).resolve().parents[3] / "recipes/open_world"
BENCH = RECIPE.parents[1] / "scripts/bench/open_world.py"
QUICKSTART = RECIPE / "quickstart.yaml"
SMALL = (
    *("model.box_dim=16", "model.channels=16", "model.regions=16", "model.proposals=80"),
    *("data.format=coco", "data.tasks=person, airplane; truck", "data.short_side=64"),
    *("data.long_side=64", "optim.steps=3, 2", "optim.finetune_steps=0, 1", "optim.milestones="),
    *("train.save_every=1", "train.log_every=1", "train.global_batch=2", "train.micro_batch=1"),
    *("method.start=1", "method.exemplars=3", "train.pictures=2", "train.device=cpu"),
    *("method.fit_pictures=4", "method.samples=proposals"),
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


def test_a_dry_run_opens_no_data(folder, tmp_path):
    """The folder of the data may be missing; the micro-batch shrinks to a process's part."""
    missing = config(folder, tmp_path, "data.path=nowhere", "train.micro_batch=2")
    lines = dry_run.report(missing, 2).splitlines()
    assert lines[:5] == [
        "faster_rcnn on litv2_tiny, 3 classes in 2 tasks",
        "batch 2 = 1 x 1 accumulated x 2 processes",
        "  t1_train: steps 0 to 3, person, airplane",
        "  t2_train: steps 3 to 5, truck",
        "  t2_ft: steps 5 to 6, all known classes",
    ]
    assert "predicted memory at 1 x 64 x 64: " in lines[7]
    with pytest.raises(ConfigError, match="global_batch=2 cannot be shared by 3 processes"):
        dry_run.report(missing, 3)
    with pytest.raises(ConfigError, match="one for each of 1 task"):
        dry_run.report(config(folder, tmp_path, "data.tasks=person"), 1)


@pytest.mark.parametrize("policy", ["plain", "mesa8"])
def test_predicted_activations_are_those_of_a_step(folder, tmp_path, policy):
    run = fit.prepare(config(folder, tmp_path, f"train.policy={policy}", "train.precision=no"))
    run.enter(run.stages[0])
    expected = dry_run.predicted_memory(run.config, 3, None)
    counts = []
    for _ in range(4):
        images, targets = run.inputs(next(run.batches()))
        counted = footprint(
            run.model, [images, targets], policy=policy, loss=lambda x: sum(x.values())
        )
        counts.append(counted.saved_bytes)
    # A picture has fewer positive regions than the prediction assumes.
    assert max(counts) <= expected["activations"] <= 1.25 * max(counts)
    assert expected["weights"] == counted.parameter_bytes + counted.buffer_bytes


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
    _other_energies(tmp_path / "once", folder)
    own = config(folder, tmp_path / "other")
    assert evaluation.draw_folder(own, weights, folder / "val", tmp_path / "drawn") == 2
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2
    with pytest.raises(ConfigError, match="no picture"):
        evaluation.draw_folder(own, weights, tmp_path, tmp_path / "drawn")


def _other_energies(run, folder):
    """A finished run is evaluated without a configuration file, with new fits."""
    # More pseudo-unknowns, for a fit of four pictures.
    settings = fit.load_run(run, ["method.unknowns_per_image=4"])
    assert settings.data.path == str(folder)
    assert settings.method.fit_pictures == 4
    weights = run / "model.safetensors"
    modes = {"kept": "known_tail", "off": "off", "known_tail": "known_tail"}
    modes |= {"two_fits": "two_fits", "transductive": "two_fits"}
    unknown = {}
    for energy, mode in modes.items():
        identifier = evaluation.restored(settings, weights, energy=energy).model.heads.identifier
        assert identifier.mode == mode
        unknown[energy] = identifier.unknown
    assert unknown["two_fits"] != unknown["transductive"]
    with pytest.raises(ConfigError, match="one of kept, off, known_tail, two_fits, transductive"):
        evaluation.scores(settings, weights, energy="both")
    changed = fit.load_run(run, ["method.samples=detections", "test.score=0.99"])
    with pytest.raises(ConfigError, match="too few regions"):
        evaluation.scores(changed, weights, energy="known_tail")
    done = forked.run([RECIPE / "evaluate.py", "--run", run, "--energy", "off"], timeout=HUNG_S)
    assert done.returncode == 0, done.stderr
    expected = evaluation.scores(settings, weights, energy="off")
    assert f"aose                   {expected['aose']}" in done.stdout
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        fit.load_run(folder)
    _benchmark_of_energies(run, expected["aose"])


def _benchmark_of_energies(run, aose):
    """The benchmark evaluates a finished run and repeats no row."""
    (run.parent / "ore_mesa8_0").symlink_to(run)
    results = run.parent / "rows.jsonl"
    command = [BENCH, "--variants", "ore", "--policies", "mesa8", "--out", run.parent]
    command += ["--energies", "known_tail_proposals,transductive", "--results", results]
    command += ["--set", "method.samples=proposals", "--set", "method.unknowns_per_image=4"]
    for _ in range(2):
        done = forked.run(command, timeout=HUNG_S)
        assert done.returncode == 0, done.stderr
    found = records.read(results)
    assert [row["energy"] for row in found] == ["known_tail_proposals", "transductive"]
    for row in found:
        assert (row["variant"], row["name"], row["stage"]) == ("ore", "mesa8", "t2_ft")
        assert row["aose"] <= aose
    assert set(found[1]["fits"]) == {"known", "unknown"}


def test_pictures_of_the_fit_are_held_out_and_have_all_known_classes(folder, tmp_path):
    once, again = (fit.prepare(config(folder, tmp_path)) for _ in range(2))
    held_out = {picture.path for picture in once.data.fit}
    assert len(held_out) == 4
    assert [p.path for p in again.data.fit] == [p.path for p in once.data.fit]
    for stage in once.stages:
        assert not held_out & {p.path for p in once.data.stage(stage).pictures}
    # Another seed is another draw.
    other = fit.prepare(config(folder, tmp_path, "train.seed=3"))
    assert {p.path for p in other.data.fit} != held_out
    everything = fit.prepare(config(folder, tmp_path, "method.energy=off"))
    assert not everything.data.fit
    assert everything.images > once.images

    def labels(seen, unknowns):
        pictures = once.data.fit_set(seen, unknowns=unknowns).pictures
        return {label for p in pictures for label in p.objects.labels[p.objects.trained].tolist()}

    assert labels(2, False) == {0, 1}
    # In task 2, the classes of task 1 are annotated in the fit.
    assert labels(3, False) == {0, 1, 2}
    assert labels(2, True) == {0, 1, 3}
    with pytest.raises(ConfigError, match="at most half of the 12 training pictures"):
        fit.prepare(config(folder, tmp_path, "method.fit_pictures=7"))


def test_a_split_of_its_own_for_the_fit(folder, tmp_path, caplog):
    root = tmp_path / "data"
    shutil.copytree(folder, root)
    entry = json.loads((root / "annotations/instances_train.json").read_text())
    kept = [a for a in entry["annotations"] if a["category_id"] != 6]
    (root / "annotations/instances_held.json").write_text(json.dumps(entry | {"annotations": kept}))
    shutil.copytree(root / "train", root / "held")
    own = ("data.fit=held", "method.energy=two_fits", "method.transductive=true")
    own += ("method.unknowns_per_image=4",)
    run = fit.prepare(config(root, tmp_path / "out", *own))
    assert len(run.data.fit) == 4
    assert all(Path(p.path).parent.name == "held" for p in run.data.fit)
    assert run.images == fit.prepare(config(folder, tmp_path, "method.energy=off")).images
    for stage in run.stages[:2]:
        run.enter(stage)
    # Kites are not annotated here, so no object is unknown after the last task.
    assert run.fit_energies()
    assert "no annotated unknown object" in caplog.text
