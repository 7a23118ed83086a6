"""The scripts of the efficient models: counts, pictures, and the comparison of two runs."""

import json

import efficient
import efficient_pictures as pictures
import pytest
import quickstarts
import torch
from safetensors.torch import save_file
from tables.efficient import efficient_memory
from tables.efficient import quickstarts as table_of_quickstarts

from mesa_train.utils import records


def test_counts_and_their_table(tmp_path):
    rows = tmp_path / "efficient.jsonl"
    efficient.main("hvt_ti_1", "float32", batch_size=1, image_size=224, out=rows)
    (row,) = records.read(rows)
    sizes = row["saved_bytes"]
    assert list(sizes) == list(efficient.METHODS)
    assert sizes["plain"] > 2.5 * sizes["mesa8"] > 2.5 * sizes["mesa4"]
    (line,) = [line for line in efficient_memory.render([row]).splitlines() if "`hvt_ti_1`" in line]
    assert f"({sizes['plain'] / sizes['mesa8']:.2f}x)" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("hvt_ti_1", "fp8"), "no precision fp8; choose from float32, bf16"),
        (("hvt_xl", "bf16"), "no model hvt_xl"),
    ],
)
def test_mistakes_of_a_count_are_one_line(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        efficient.main(*options, batch_size=1, image_size=224, out=tmp_path / "rows.jsonl")


def test_two_runs_are_the_same_only_if_all_weights_are(tmp_path):
    for name, value in (("one", 1.0), ("two", 1.0), ("three", 1.0 + 2**-23)):
        folder = tmp_path / name / "checkpoints/step-00000002"
        folder.mkdir(parents=True)
        save_file({"w": torch.tensor([0.0, value])}, folder / "model.safetensors")
    assert quickstarts.same_weights(tmp_path / "one", tmp_path / "two")
    assert not quickstarts.same_weights(tmp_path / "one", tmp_path / "three")
    with pytest.raises(SystemExit, match="no quickstart hvt; choose from hvt_quickstart"):
        quickstarts.main(only="hvt")


def test_the_table_of_quickstarts_says_if_a_resumed_run_differs():
    row = {"name": "hvt_quickstart", "steps": 4, "top1": 0.5, "killed_after": 3, "same": False}
    row |= {"predicted": {"activations": 2**20, "weights": 2**20, "images": 2**30}}
    row |= {"measured": {"activations": 2**20, "peak": 3 * 2**20}, **records.provenance()}
    line = table_of_quickstarts.render([row]).splitlines()[2]
    assert (
        line
        == "| `hvt_quickstart` | 4 | 50.0% | step 3: differs | 1.0 MiB / 1.0 MiB | 2.0 MiB / 3.0 MiB |"
    )


def test_other_patches_are_dimmed():
    image = torch.zeros(3, 4, 4)
    image[:, :2, :2] = 1
    shown = pictures.dimmed(image, torch.tensor([0, 3]), (2, 2))
    assert shown.shape == (6, 6, 3)
    assert shown[1, 1].tolist() == [1, 1, 1]
    assert shown[4, 4].tolist() == [0, 0, 0]
    assert shown[1, 4].tolist() == pytest.approx([1, 0.85, 0.85])


def test_an_architecture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = {
        "msa": [[1, 1, 1], [1, 0, 0]],
        "ffn_keep": [3, 2],
        "masks": {"0": [1] * 4, "1": [1] * 4},
    }
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps({**found, "flops": 1e9}))
    pictures.architecture(path, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 1000
    assert [pictures.kind_of(one) for one in ([1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0])] == [
        "attention", "3x3 convolution", "1x1 convolution", "skip",
    ]  # fmt: skip
    path.write_text("{}")
    with pytest.raises(SystemExit, match="no architecture"):
        pictures.architecture(path, tmp_path / "found.png")
