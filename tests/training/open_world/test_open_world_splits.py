"""Tasks, splits and stages of the open-world benchmark, on a small VOC and COCO made here."""

import json
from pathlib import Path

import pytest
from open_world_folders import coco_folder, voc_folder

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.dense import coco, voc
from mesa_train.training.open_world import data, splits
from mesa_train.training.open_world.config import load, of_dict, stages_of
from mesa_train.training.open_world.tasks import OWOD, SOWODB, classes_of, tasks_of

RECIPES = Path(__file__).resolve().parents[3] / "recipes/open_world"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmark")
    trainval = {"000001": [("person", 0), ("sofa", 1)], "000002": [("aeroplane", 0)]}
    voc2007 = voc_folder(
        root / "VOC2007", {"trainval": trainval, "test": {"000003": [("person", 0)]}}
    )
    voc2012 = voc_folder(root / "VOC2012", {"trainval": {"2008_1": [("person", 0)]}})
    train = {
        "a": [("truck", 0), ("person", 0)],
        "b": [("frisbee", 0), ("truck", 0)],
        "c": [("bed", 0)],
        "d": [("truck", 1)],
        "e": [("kite", 0)],
    }
    val = {"v": [("truck", 0), ("frisbee", 0)], "w": [("bed", 0)], "x": [("airplane", 0)]}
    return voc2007, voc2012, coco_folder(root / "coco", {"train2017": train, "val2017": val})


def lists_of(folders, *, crowd=False):
    voc2007, voc2012, root = folders
    train = {"voc": {}}
    for name, folder in (("voc2007", voc2007), ("voc2012", voc2012)):
        train["voc"] |= splits.labels_of(voc.load(folder, "trainval"), name, OWOD)
    test = {"voc": splits.labels_of(voc.load(voc2007, "test"), "voc2007", OWOD)}
    for group, split in ((train, "train2017"), (test, "val2017")):
        found = coco.load(root / f"annotations/instances_{split}.json", root / split)
        group["coco"] = splits.labels_of(found, f"coco_{split}", OWOD, crowd=crowd)
    return splits.make(OWOD, train, test)


def test_the_tasks_have_the_80_classes_of_coco():
    assert [len(names) for names in OWOD.classes] == [20] * 4
    assert [len(names) for names in SOWODB.classes] == [19, 21, 20, 20]
    assert len(set(OWOD.names)) == 80
    assert set(OWOD.names) == set(SOWODB.names)
    assert OWOD.names[0] == "aeroplane"
    assert OWOD.label("couch") == OWOD.label("sofa") == 17
    assert OWOD.label("bowl") == 79
    assert (OWOD.seen(2), OWOD.of(3)) == (40, range(40, 60))
    with pytest.raises(ConfigError, match="'dragon'"):
        OWOD.label("dragon")


def test_own_tasks():
    tasks = tasks_of("cat, dog; horse", ["horse", "cat", "dog", "cow"])
    assert tasks.names == ("cat", "dog", "horse")
    assert tasks.others == ("cow",)
    assert tasks.label("cow") == 3
    for text, word in (("cat; bird", "'bird'"), ("cat; cat", "twice"), (" ; ", "class names")):
        with pytest.raises(ConfigError, match=word):
            tasks_of(text, ["cat", "dog"])


def test_the_lists_are_the_benchmarks(folders):
    lists = lists_of(folders)
    assert lists["t1_train"] == ["voc2007/000001", "voc2007/000002", "voc2012/2008_1"]
    # A crowd region is no object.
    assert lists["t2_train"] == ["coco_train2017/a", "coco_train2017/b"]
    assert lists_of(folders, crowd=True)["t2_train"][-1] == "coco_train2017/d"
    assert lists["t3_train"] == ["coco_train2017/b", "coco_train2017/e"]
    assert set(lists["t2_ft"]) <= {*lists["t1_train"], *lists["t2_train"]}
    # COCO's pictures of task 1 alone are not tested; others occur once a task.
    names = ["voc2007/000003", "coco_val2017/v", "coco_val2017/v", "coco_val2017/w"]
    assert lists["test_official"] == names
    assert lists["test"] == [names[0], names[1], names[3]]
    assert lists["t1_known_test"] == names[:1]
    # A picture of each task; at most a quarter of a list.
    val = lists["all_task_val"]
    assert len(val) == 4
    assert all(name in lists[f"t{task}_train"] for task, name in enumerate(val, 1))
    oracle = lists["t2_train_with_unk"]
    assert oracle[:-2] == lists["t2_train"]
    assert oracle[-2] in lists["t3_train"]
    assert oracle[-1] in lists["t4_train"]
    assert "t4_train_with_unk" not in lists


def test_lists_are_written_and_read(folders, tmp_path):
    lists = lists_of(folders)
    splits.write(lists, tmp_path)
    assert splits.read(tmp_path, "t3_ft") == lists["t3_ft"]
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["test_official"] == {
        "lines": 4, "pictures": 3, "official_lines": 10_246, "official_pictures": 9_119,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no list"):
        splits.read(tmp_path, "t9_train")


def test_stages_have_the_targets_of_their_task(folders, tmp_path):
    splits.write(lists_of(folders), tmp_path)
    paths = dict(zip(("voc2007", "voc2012", "coco"), map(str, folders), strict=True))
    config = of_dict({"data": {"lists": str(tmp_path), "test": "test_official", **paths}})
    config.check_files()
    found = data.load(config)
    stages = {stage.name: stage for stage in stages_of(config.optim, 4)}
    assert list(stages) == [f"t{t}_{k}" for t in range(1, 5) for k in ("train", "ft")][:1] + [
        f"t{t}_{k}" for t in range(2, 5) for k in ("train", "ft")
    ]
    assert stages["t4_ft"].last == 160_500

    def labels(name):
        pictures = found.stage(stages[name]).pictures
        return [p.objects.labels[p.objects.trained].tolist() for p in pictures]

    person, sofa, plane, truck = (OWOD.label(n) for n in ("person", "sofa", "airplane", "truck"))
    # Difficult objects are trained on.
    assert labels("t1_train") == [[person, sofa], [plane], [person]]
    # Persons are unlabelled in task 2, and labelled again in its replay.
    assert labels("t2_train") == [[truck], [truck]]
    assert [truck, person] in labels("t2_ft")
    assert len(found.test) == 4
    targets = found.targets()
    assert targets[1]["labels"].tolist() == [truck, OWOD.label("frisbee")]
    assert not targets[0]["difficult"].any()


def test_the_fit_has_its_list(folders, tmp_path):
    splits.write(lists_of(folders), tmp_path)
    paths = dict(zip(("voc2007", "voc2012", "coco"), map(str, folders), strict=True))

    def loaded(energy, **changes):
        own = {"lists": str(tmp_path), **paths, **changes}
        return data.load(of_dict({"data": own, "method": {"energy": energy, "fit_pictures": 2}}))

    def stems(pictures):
        return [Path(picture.path).stem for picture in pictures]

    (tmp_path / "mine.txt").write_text("voc2007/000001\ncoco_train2017/b\ncoco_train2017/b\n")
    found = loaded("two_fits", fit="mine")
    assert stems(found.fit) == ["000001", "b"]
    assert stems(found.training[1]) == ["000002", "2008_1"]
    assert stems(found.training[2]) == ["a"]
    assert "b" not in {Path(path).stem for path in found.replay[3]}
    # After task 1, the truck and the frisbee of b are unknown.
    unknowns = found.fit_set(20, unknowns=True).pictures
    assert [p.objects.labels[p.objects.trained].tolist() for p in unknowns][1] == [80, 80]
    assert stems(loaded("two_fits", fit="mine", fit_trained=True).training[2]) == ["a", "b"]
    assert not loaded("off", fit="mine").fit
    (tmp_path / "mine.txt").write_text("voc2007/000003\n")
    with pytest.raises(ConfigError, match=r"data\.fit=mine has 1 test pictures"):
        loaded("two_fits", fit="mine")


def test_the_rate_of_each_stage():
    config = of_dict({})
    train, finetune = (
        next(s for s in stages_of(config.optim, 4) if s.name == name)
        for name in ("t2_train", "t2_ft")
    )
    assert (train.first, train.last, finetune.last) == (18_000, 70_000, 74_000)
    for step, rate in ((0, 1e-4), (99, 0.01), (31_999, 0.01), (32_000, 1e-3), (42_000, 1e-4)):
        assert train.rate(config.optim, 18_000 + step) == pytest.approx(rate)
    assert finetune.rate(config.optim, 70_000) == 1e-4


@pytest.mark.parametrize(
    ("section", "values", "word"),
    [
        ("optim", {"steps": "5, x, 5, 5"}, "optim.steps"),
        ("optim", {"finetune_steps": "5, 5"}, "finetune_steps .* of 4 task"),
        ("optim", {"milestones": "5; 5"}, "milestones must have 4"),
        ("optim", {"steps": "0, 5, 5, 5"}, "positive"),
        ("method", {"feature_scale": "unit"}, "none, sqrt_dim"),
        ("method", {"transductive": True}, "two_fits"),
        ("method", {"energy": "both"}, "known_tail"),
        ("method", {"samples": "regions"}, "detections, proposals"),
        ("data", {"fit": "test"}, "data.fit=test has the test pictures"),
        ("data", {"fit_trained": True}, "needs data.fit"),
        ("data", {"tasks": "cat; dog"}, "owod, sowodb"),
        ("train", {"global_batch": 3, "micro_batch": 2}, "multiple"),
    ],
)
def test_mistakes_are_one_line(section, values, word):
    with pytest.raises(ConfigError, match=word) as error:
        stages_of(of_dict({section: values}).optim, 4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_complete(path):
    config = load(path)
    stages = stages_of(config.optim, len(classes_of(config.data.tasks)))
    assert stages[-1].last == (160_500 if config.data.format == "benchmark" else stages[-1].last)
    if config.data.format == "benchmark":
        with pytest.raises(ConfigError, match=r"data\.lists is missing"):
            config.check_files()
    else:
        config.check_files()
