"""The evaluation recipe, as a user calls it: packaged digits, own folders, groups, mistakes."""

import csv
import importlib.util
import io
import json
import os
import re
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import typer
from browser import BROWSER, browse, printed
from limits import HUNG_S
from PIL import Image
from typer.testing import CliRunner

import mesa_train.models  # noqa: F401  timm knows them from here on
from mesa_train.training.evaluation.suite import frozen, groups, images, page, tasks

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "recipes/evaluate/run.py"
HUMANS = REPOSITORY / "recipes/evaluate/data/human_responses.npz"


def call(*arguments):
    """(exit code, all that is printed) of the script in this process."""
    specification = importlib.util.spec_from_file_location("evaluate", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    done = CliRunner().invoke(app, ["--cpu", *map(str, arguments)], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def picture(path, tone, generator):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = generator.integers(0, 40, (30, 30, 3))
    Image.fromarray((noise + tone).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two splits of three classes that differ in brightness, and a CSV of groups."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 20), ("held_out", 8)):
        for label, tone in (("dark", 20), ("grey", 100), ("light", 200)):
            for i in range(count):
                picture(root / split / label / f"{i}.png", tone, generator)
    rows = [
        {"file": f"train/{name}/{i}.png", "label": int(name == "light"), "group": "ab"[i % 2]}
        for name in ("dark", "light")
        for i in range(20)
    ]
    with (root / "groups.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file", "label", "group"])
        writer.writeheader()
        writer.writerows(rows)
    return root


def test_own_folders_and_groups(folders, tmp_path):
    options = ["--train", folders / "train", "--held-out", folders / "held_out", "--groups",
               folders / "groups.csv", "--tasks", "probe,fewshot,fairness,ood_detection",
               "--out", tmp_path]  # fmt: skip
    code, output = call(*options)
    assert code == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {(r["task"], r["metric"]): r for r in report["rows"]}
    assert rows["probe", "top-1 accuracy"]["value"] == 1.0
    assert rows["fewshot", "10-shot accuracy"]["value"] > 0.9
    # Three classes have no two halves, and no class has 25 images.
    assert rows["fewshot", "25-shot accuracy"]["value"] is None
    assert "a class has 20" in rows["fewshot", "25-shot accuracy"]["note"]
    assert "--out-set FOLDER" in rows["ood_detection", "AUROC"]["note"]
    assert rows["fairness", "accuracy"]["value"] == 1.0
    # Label and group are independent here, so all groups are answered alike.
    assert rows["fairness", "gap of accuracies"]["value"] == 0.0
    assert {"parity at 0", "accuracy at 0.05", "accuracy of a"} <= {m for _, m in rows}
    assert report["about"]["features computed"] == 60 + 24 + 40

    code, output = call(*options)
    assert code == 0, output
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["about"]["features computed"] == 0
    assert again["rows"] == report["rows"]

    # The same pictures without labels: in class folders, or in one folder.
    found = []
    for outside in (folders / "held_out", folders / "held_out/dark"):
        code, output = call(*options[:-4], "--tasks", "ood_detection", "--out", tmp_path,
                            "--out-set", outside)  # fmt: skip
        assert code == 0, output
        rows = json.loads((tmp_path / "report.json").read_text())["rows"]
        found.append(rows[0])
    assert [row["note"].split(";")[0] for row in found] == [
        "24 images inside, 24 outside", "24 images inside, 8 outside"
    ]  # fmt: skip
    assert found[0]["value"] == 0.5  # the same images inside and outside


MISTAKES = [
    (["--tasks", "probe,prob"], "--tasks must be of probe, fewshot, knn"),
    (["--model", "vit_bas"], "no model 'vit_bas' in timm and no folder with a config.json"),
    (["--model", "moco_vit_conv_small", "--image-size", "30"], "multiple of 16 pixels"),
    (["--weights", "no.safetensors"], "--weights: no file no.safetensors"),
    (["--train", "nowhere"], "or a folder with a --held-out folder beside it; got nowhere"),
    (["--train", "nowhere", "--held-out", "x"], "--train: no such folder nowhere"),
    (["--held-out", "x"], "--held-out: digits has its own held-out images"),
    (["--groups", "no.csv"], "--groups: no file no.csv"),
    (["--out-set", "no/such"], "--out-set: no such folder no/such"),
    (["--model", "vit_22b_tiny", "--model", "no_vit"], "no model 'no_vit' in timm"),
    (["--model", "vit_22b_tiny", "--model", "moco_vit_tiny", "--weights", "random"],
     "got 1 for 2 models; random stands for random weights"),
    (["--model", "moco_vit_tiny", "--model", "moco_vit_tiny"], "is given twice"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[m[:30] for _, m in MISTAKES])
def test_a_mistake_is_one_line(options, message, tmp_path):
    code, output = call(*options, "--out", tmp_path / "out")
    assert code == 1
    assert message in output
    assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "report").write_text("x")
    code, output = call("--out", tmp_path / "report")
    assert (code, output.strip()) == (
        1, f"evaluate: --out: {tmp_path / 'report'} is a file, not a folder"
    )  # fmt: skip


def test_a_task_that_fails_is_a_row_and_the_others_are_written(folders, tmp_path):
    """A picture of the groups cannot be decoded; it is found when its features are computed."""
    lines = (folders / "groups.csv").read_text().splitlines()
    for line in lines[1:]:
        path = tmp_path / line.split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folders / line.split(",")[0]).read_bytes())
    path.write_bytes(b"no picture")
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    code, output = call(
        "--train", folders / "train", "--held-out", folders / "held_out", "--groups",
        tmp_path / "groups.csv", "--tasks", "fairness,fewshot", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, output
    first, *rest = json.loads((tmp_path / "out/report.json").read_text())["rows"]
    assert (first["task"], first["value"]) == ("fairness", None)
    assert first["note"].startswith(f"failed: {path} cannot be decoded")
    assert {row["task"] for row in rest} == {"fewshot"}
    assert rest[0]["value"] is not None


def test_a_bug_in_a_task_shows_itself_after_the_finished_rows_are_written(
    folders, tmp_path, monkeypatch
):
    def broken(e):
        raise ZeroDivisionError

    monkeypatch.setitem(tasks.TASKS, "knn", broken)
    options = ["--train", folders / "train", "--held-out", folders / "held_out"]
    code, output = call(*options, "--tasks", "fewshot,knn", "--out", tmp_path)
    assert code == 1
    assert "evaluate:" not in output
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {row["task"] for row in rows} == {"fewshot"}


def test_few_training_images_give_rows_with_the_reason(folders, tmp_path):
    for label, count in (("dark", 3), ("light", 2)):
        for i in range(count):
            picture(tmp_path / "train" / label / f"{i}.png", 20 if label == "dark" else 200,
                    np.random.default_rng(i))  # fmt: skip
    for split, labels in (("held_out", ("dark", "light")),):
        for label in labels:
            picture(tmp_path / split / label / "0.png", 20 if label == "dark" else 200,
                    np.random.default_rng(9))  # fmt: skip
    code, output = call("--train", tmp_path / "train", "--held-out", tmp_path / "held_out",
                        "--tasks", "knn,probe", "--views", 2, "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, output
    report = json.loads((tmp_path / "out/report.json").read_text())
    rows = {r["metric"]: r for r in report["rows"]}
    assert rows["k = 10"]["value"] is None
    assert rows["k = 10"]["note"] == "there are 5 training images"
    assert rows["top-1 accuracy"]["value"] == 1.0
    assert rows["top-1 accuracy"]["note"].endswith(
        "chosen on 1 of 5 training images, 2 views of each"
    )
    # Five training images twice, and two held-out images.
    assert report["about"]["features computed"] == 12


def test_views_are_mild_crops_of_view_and_index_alone(folders):
    (known, _) = images.of_folders(str(folders / "train"), str(folders / "held_out"))
    plain, first, again, second = (
        np.asarray(images.viewed(known, 3, view)) for view in (0, 1, 1, 2)
    )
    assert np.array_equal(plain, np.asarray(known.read(3)))
    assert first.shape == plain.shape
    assert np.array_equal(first, again)
    assert not np.array_equal(first, plain)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("labels", "group", "split", "message"),
    [
        ("0" * 12, "ab" * 6, None, "no image of label 1 in the split fit, which needs one"),
        ("01" * 4, "aaaaaaab", None, "in the split tune"),
        ("01" * 6, "ab" * 6, ["fit"] * 6 + ["tune"] * 3 + ["test"] * 3, ""),
        ("01" * 6, "aabb" * 3, ["fit"] * 4 + ["tune"] * 4 + ["test"] * 4, None),
        ("01" * 6, "aabb" * 3, ["fit"] * 6 + ["tune"] * 4 + ["test"] * 2,
         "no image of group a in the split test"),
        ("01" * 6, "aabb" * 3, ["fit"] * 4 + ["tune"] * 8, "no image of label 0 and label 1 and group a"),
    ],
)  # fmt: skip
def test_each_split_of_groups_needs_both_labels_and_tune_and_test_each_group(
    labels, group, split, message, tmp_path
):
    lines = ["file,label,group" + (",split" if split else "")]
    for i, (label, own) in enumerate(zip(labels, group, strict=True)):
        (tmp_path / f"{i}.png").touch()
        lines.append(f"{i}.png,{label},{own}" + (f",{split[i]}" if split else ""))
    path = tmp_path / "groups.csv"
    path.write_text("\n".join(lines))
    if not message:
        found = groups.of_csv(path)
        assert [found.split.count(name) for name in groups.SPLITS] == [
            split.count(name) for name in groups.SPLITS
        ]
        return
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        groups.of_csv(path)
    assert str(path) in str(error.value)
    assert str(error.value).startswith("--groups: ")


def test_twelve_rows_without_a_split_have_every_label_and_group_where_they_are_needed():
    labels, group = list("001100110011"), list("010101010101")
    split = groups.in_turn(labels, group)
    assert [split.count(name) for name in groups.SPLITS] == [6, 3, 3]
    for name in ("tune", "test"):
        rows = [i for i, own in enumerate(split) if own == name]
        assert {labels[i] for i in rows} == {"0", "1"}
        assert {group[i] for i in rows} == {"0", "1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n", "it lacks group"),
        ("file,label,group\na.png,2,x\n", "line 2: label must be 0 or 1, got '2'"),
        ("file,label,group\na.png,1,x\n", "line 2: no file a.png"),
        ("file,label,group\nb.png,1,x\n", "needs two groups and at least 8 images"),
        ("file,label,group,split\nb.png,1,x,val\n", "split must be fit, tune or test, got 'val'"),
    ],
)
def test_a_wrong_table_of_groups_is_one_line(text, message, tmp_path):
    (tmp_path / "b.png").touch()
    (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        groups.of_csv(tmp_path / "groups.csv")


def test_the_page_stands_alone_and_reads_on_a_phone_and_in_print(tmp_path):
    rows = [
        tasks.Row("probe", "a<b>", "top-1", 0.5),
        tasks.Row("ood", "x", "y", None, note="no & z"),
    ]
    plots = {"few-shot": ([1, 5], [0.2, 0.4]), "selective": ([0.5, 1.0], [1.0, 0.8]),
             "reliability": {"confidence": [0.5], "accuracy": [0.4], "share": [1.0]}}  # fmt: skip
    about = {"model": "m", "command": "python <x>"}
    files = page.write(tmp_path, [page.Report(about, rows, plots)])
    assert [f.name for f in files] == ["report.json", "plots.png", "report.html"]
    text = files[-1].read_text()
    assert "a&lt;b&gt;" in text
    assert "no &amp; z" in text
    assert "python &lt;x&gt;" in text
    assert 'content="width=device-width, initial-scale=1"' in text
    assert "@media print" in text
    assert "@media (max-width: 40rem)" in text
    assert "<svg" in text
    assert "50.0 %" in text
    assert "not measured" in text
    outside = re.findall(r'(?:src|href)="(?!data:|#)([^"]+)"', text) + re.findall(r"@import", text)
    assert not outside


# --- several models ---


def test_two_models_share_a_report(folders, tmp_path):
    """One of timm with weights of a file, one of transformers."""
    import timm
    from safetensors.torch import save_file
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(3)
    # Without a classifier: its number of classes is read from the file.
    weights = timm.create_model("moco_vit_tiny", num_classes=0).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "image_size": 28, "patch_size": 14}  # fmt: skip
    ViTModel(ViTConfig(**small)).save_pretrained(tmp_path / "vit")
    code, output = call(
        "--train", folders / "train", "--held-out", folders / "held_out", "--tasks", "fewshot,knn",
        "--model", "moco_vit_tiny", "--weights", tmp_path / "w.safetensors",
        "--model", tmp_path / "vit", "--weights", "pretrained", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, output
    first, second = json.loads((tmp_path / "out/report.json").read_text())["models"]
    assert first["about"]["weights"] == str(tmp_path / "w.safetensors")
    assert (second["about"]["model"], second["about"]["weights"]) == (str(tmp_path / "vit"), "pretrained")  # fmt: skip
    # Both are measured, each with its own features.
    assert [r["about"]["features computed"] for r in (first, second)] == [84, 84]
    assert [r["metric"] for r in first["rows"]] == [r["metric"] for r in second["rows"]]
    assert [r["value"] for r in first["rows"]] != [r["value"] for r in second["rows"]]
    text = (tmp_path / "out/report.html").read_text()
    assert f"<h1>moco_vit_tiny and {tmp_path / 'vit'}</h1>" in text
    for report in (first, second):
        name, value = report["about"]["model"], report["rows"][0]["value"]
        assert f'data-model="{name}"><span>{100 * value:.1f} %</span>' in text


def report(model, *rows, weights="w"):
    return page.Report({"model": model, "weights": weights, "date": "d"}, rows)


def test_values_of_several_models_are_in_the_row_of_their_metric():
    both = [
        report("a", tasks.Row("knn", "x", "k = 10", 0.5), tasks.Row("probe", "x", "lr", 1.0, False)),
        report("b", tasks.Row("probe", "x", "own", 0.25, note="n"),
               tasks.Row("knn", "x", "k = 10", None, note="why")),
    ]  # fmt: skip
    found = page.lines(both)
    assert [(line.task, line.metric) for line in found] == [
        ("knn", "k = 10"), ("probe", "lr"), ("probe", "own"),
    ]  # fmt: skip
    assert [list(line.values.values()) for line in found] == [
        ["50.0 %", "not measured"], ["1.000", ""], ["", "25.0 %"],
    ]  # fmt: skip
    # Only one model has the reason, so the note says which.
    assert [line.note for line in found] == ["b: why", "", "n"]
    table = page.table(both)
    assert [column.header for column in table.columns] == ["task", "data", "metric", "a", "b", "note"]  # fmt: skip
    # On a terminal, the notes of numbers would take most of the room.
    assert list(table.columns[-1].cells) == ["b: why", "", ""]


def test_long_paths_are_short_on_a_terminal_of_80_columns():
    train, other = "/data/sets/of/somebody/imagenet/validation", "/scratch/other/validation"
    rows = [
        tasks.Row("probe", train, "top-1 accuracy", 0.5, note="learning rate 0.1"),
        tasks.Row("ood", other, "top-1 accuracy", 0.25),
        tasks.Row("knn", "digits/held_out", "k = 10", 0.25),
    ]
    assert page.shortened([r.data for r in rows]) == {
        train: "…/imagenet/validation", other: "…/other/validation",
        "digits/held_out": "digits/held_out",
    }  # fmt: skip
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(page.table([report("m", *rows)]))
    lines = console.export_text().splitlines()
    for row in rows:
        line = next(line for line in lines if line.strip().startswith(row.task))
        assert page.shortened([r.data for r in rows])[row.data] in line
        assert row.metric in line


def test_models_of_one_name_are_told_apart():
    assert page.labels([report("m", weights="v"), report("m"), report("n")]) == [
        "m, v",
        "m, w",
        "n",
    ]
    assert page.labels([report("m"), report("m")]) == ["m, w (1)", "m, w (2)"]


def test_facts_that_models_share_stand_once():
    row = tasks.Row("knn", "x", "k = 10", 0.5)
    text = page.html([report("a", row, weights="one"), report("b", row, weights="two")], [])
    assert text.count("<dt>date</dt>") == 1
    assert text.count("<dt>weights</dt>") == 2
    assert text.index("<h2>a</h2>") < text.index("<dd>one</dd>") < text.index("<h2>b</h2>")
    # On a phone, where the head is hidden, a cell names its model.
    assert "content: attr(data-model)" in text
    assert text.count('data-model="b"') == 1
    single = page.html([report("a", row)], [])
    assert "several" not in re.sub(r"<style>.*?</style>", "", single, flags=re.DOTALL)


PROBE = """<pre id="found"></pre><script>
const shown = (e) => getComputedStyle(e).display !== "none";
const outside = (e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest("svg");
const cell = document.querySelectorAll("td.number")[1];
document.getElementById("found").textContent = JSON.stringify({
  width: innerWidth, errors: window.errors,
  overflow: document.documentElement.scrollWidth - innerWidth,
  outside: [...document.querySelectorAll("main *")].filter(outside).map((e) => e.outerHTML),
  head: shown(document.querySelector("thead")),
  label: getComputedStyle(cell, "::before").content, value: cell.textContent,
  background: getComputedStyle(document.body).backgroundColor,
});</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium: apt-get install chromium")
def test_a_page_of_two_models_fits_a_phone_and_prints(tmp_path):
    pytest.importorskip("matplotlib")
    long = "runs/a_folder_with_a_long_name/and_another_one/vit_base_patch16_224_of_transformers"
    note = "learning rate 0.1 chosen on a tenth of 4000 training images"
    reports = [
        page.Report(
            {"model": name, "command": "python " + "x" * 200},
            [tasks.Row("probe", "mnist5k/held_out", "top-1 accuracy", 0.5, note=f"{name} {note}")],
            {"few-shot": ([1, 5], [0.2, 0.4])},
        )
        for name in ("moco_vit_tiny", long)
    ]
    text = page.write(tmp_path / "out", reports)[-1].read_text()
    phone = browse(tmp_path, text, PROBE, width=390)
    assert phone["width"] == 390
    assert (phone["errors"], phone["outside"]) == ([], [])
    # Also of text that leaves its element: a long name in a heading.
    assert phone["overflow"] <= 0
    # The head is hidden, so the value of the second model has the model's name beside it.
    assert (phone["head"], phone["label"], phone["value"]) == (False, f'"{long}"', "50.0 %")
    wide = browse(tmp_path, text, PROBE, "--window-size=1280,900")
    assert (wide["head"], wide["label"], wide["outside"]) == (True, "none", [])
    assert printed(tmp_path, text).startswith(b"%PDF")


# --- models ---


def test_transformers_models(tmp_path):
    from transformers import (
        Dinov2Config,
        Dinov2ForImageClassification,
        SiglipVisionConfig,
        SiglipVisionModel,
        ViTConfig,
        ViTModel,
    )

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "image_size": 28, "patch_size": 14}  # fmt: skip
    torch.manual_seed(0)
    x = torch.randn(2, 3, 28, 28)
    dino = Dinov2ForImageClassification(Dinov2Config(**small, num_labels=5)).eval()
    vit, siglip = (
        ViTModel(ViTConfig(**small)).eval(),
        SiglipVisionModel(SiglipVisionConfig(**small)),
    )
    found = {}
    for name, model in (("dino", dino), ("vit", vit), ("siglip", siglip.eval())):
        model.save_pretrained(tmp_path / name)
        found[name] = frozen.load_model(
            str(tmp_path / name), None, size=None, classes=None, device="cpu"
        )
        assert found[name].size == 28
    with torch.no_grad():
        # A classifier's input: class token and mean of the patches.
        features = found["dino"].features(x)
        assert features.shape == (2, 32)
        torch.testing.assert_close(found["dino"].logits(features), dino(x).logits)
        # The pooler of a ViT is random, so the class token is taken.
        torch.testing.assert_close(found["vit"].features(x), vit(x).last_hidden_state[:, 0])
        torch.testing.assert_close(found["siglip"].features(x), siglip(x).pooler_output)
    assert found["vit"].classifier is None
    with pytest.raises(ValueError, match="vit has no classifier"):
        found["vit"].logits(features)


@pytest.mark.parametrize("name", ["vit_22b_tiny", "litv2_tiny", "moco_vit_tiny"])
def test_models_of_this_project_and_their_weights(name, tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=4, img_size=56).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = frozen.load_model(
        name, str(tmp_path / "w.safetensors"), size=56, classes=4, device="cpu"
    )
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(loaded.features(x)), model(x))
    assert loaded.classifier.out_features == 4


def test_pixels_follow_the_rule_of_the_set():
    model = frozen.load_model("moco_vit_tiny", None, size=28, classes=None, device="cpu")
    wide = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8)[None, :, None] * 3, (40, 1, 3)))
    squash, square, short = (
        model.pixels(wide, squash=True), model.pixels(wide), model.pixels(wide, short_side=37),
    )  # fmt: skip
    spread = [(p[0, 0, -1] - p[0, 0, 0]).item() for p in (squash, square, short)]
    # The whole width; 7/8 of it; a crop of 28 of the 74 pixels.
    assert spread[0] > spread[1] > spread[2] > 0
    assert spread[2] / spread[0] == pytest.approx(28 / 74, abs=0.03)


@pytest.mark.slow
def test_digits_from_end_to_end(tmp_path):
    done = forked.run(
        [SCRIPT, "--cpu", "--out", tmp_path, "--data", tmp_path / "none"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        timeout=HUNG_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["task"] for row in report["rows"]} == set(tasks.TASKS)
    rows = {(r["task"], r["metric"]): r["value"] for r in report["rows"]}
    # Random features of a tiny ViT; chance is 0.1.
    assert rows["probe", "top-1 accuracy"] > 0.85
    assert rows["fewshot", "25-shot accuracy"] > rows["fewshot", "1-shot accuracy"]
    assert rows["ood_detection", "maha: AUROC"] > 0.8
    assert rows["human", "error consistency"] is None
    assert (tmp_path / "plots.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_transformers_model_is_trained_and_evaluated(tmp_path):
    script = REPOSITORY / "recipes/evaluate/train_transformers.py"
    done = forked.run(
        [script, "--cpu", "--data", "digits", "--epochs", 4, "--out", tmp_path / "vit"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        timeout=HUNG_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(r"([\d.]+)% of 360 held-out images", done.stdout)
    assert float(said[1]) > 60
    code, output = call("--model", tmp_path / "vit", "--weights", "pretrained", "--tasks", "probe",
                        "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, output
    found = json.loads((tmp_path / "out/report.json").read_text())["rows"]
    (own,) = [r["value"] for r in found if r["metric"] == "top-1 of the model's classifier"]
    # The same images, resized to the model's own size, through the saved image processor.
    assert 100 * own == pytest.approx(float(said[1]), abs=0.1)


@pytest.mark.slow
def test_two_processes_share_the_features(folders, tmp_path, monkeypatch):
    options = ["--cpu", "--train", folders / "train", "--held-out", folders / "held_out",
               "--tasks", "knn,probe"]  # fmt: skip
    reports = []
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone",
                                                 "--nproc_per_node", "2"])):  # fmt: skip
        done = forked.run(
            [*launcher, SCRIPT, *options, "--out", tmp_path / name],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
                 "CUDA_VISIBLE_DEVICES": ""},
            timeout=HUNG_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        reports.append(json.loads((tmp_path / name / "report.json").read_text())["rows"])
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_a_picture_that_one_of_two_processes_cannot_read_is_a_row_on_both(folders, tmp_path):
    """Pieces of 8 images: the second process computes the second piece of the held-out images."""
    shutil.copytree(folders, tmp_path / "images")
    broken = tmp_path / "images/held_out/grey/0.png"
    broken.write_bytes(b"no picture")
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import runpy\n"
        "from mesa_train.training.evaluation.suite import images\n"
        "images.PIECE = 8\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    options = ["--cpu", "--train", tmp_path / "images/train", "--held-out", tmp_path / "images/held_out",
               "--groups", tmp_path / "images/groups.csv", "--tasks", "knn,fairness"]  # fmt: skip
    done = forked.run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", starter, *options,
         "--out", tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
             "CUDA_VISIBLE_DEVICES": ""},
        timeout=HUNG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, *rest = json.loads((tmp_path / "out/report.json").read_text())["rows"]
    assert (first["task"], first["value"]) == ("knn", None)
    assert str(broken) in first["note"]
    assert {row["task"] for row in rest} == {"fairness"}
    assert rest[0]["value"] is not None
