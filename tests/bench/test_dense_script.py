"""The counted steps save what the real models save."""

import dense as script
import pytest
import torch
from dense import parts
from tables.dense import dense, dense_training

from mesa_train.measure.footprint import footprint
from mesa_train.models.dense import mask_rcnn, retinanet
from mesa_train.training.dense.memory import RegionStep, RetinaNetStep
from mesa_train.utils import records


@pytest.mark.slow
def test_a_counted_step_of_retinanet_saves_the_models_bytes():
    torch.manual_seed(0)
    model = retinanet("litv2_tiny", 5, min_size=64, max_size=96).train()
    target = {"boxes": torch.tensor([[3.0, 4, 40, 50]]), "labels": torch.tensor([2])}
    for policy in ("plain", "mesa8"):
        real = footprint(model, [[torch.rand(3, 64, 96)] * 2, [target] * 2], policy=policy)
        inputs = [torch.zeros(2, 3, 64, 96), [target] * 2]
        counted = footprint(RetinaNetStep(model), inputs, policy=policy, fake=True)
        assert counted.saved_bytes == real.saved_bytes
        assert sum(parts(counted).values()) == counted.saved_bytes
        assert min(parts(counted).values()) > 0


@pytest.mark.slow
def test_a_counted_step_of_mask_rcnn_runs_on_real_tensors_too():
    torch.manual_seed(0)
    step = RegionStep(mask_rcnn("litv2_tiny", 5)).train()
    images = torch.rand(2, 3, 64, 96)
    counts = [footprint(step, [images], policy="plain", fake=fake) for fake in (True, False)]
    assert counts[0].saved_bytes == counts[1].saved_bytes


@pytest.mark.parametrize(
    ("model", "backbone"),
    [
        pytest.param("faster_rcnn", "litv2_tiny:w4", marks=pytest.mark.slow),
        ("open_world_rcnn", "litv2_tiny"),
    ],
)
def test_a_small_case_is_counted(model, backbone, tmp_path, monkeypatch):
    monkeypatch.setitem(script.SIZES, model, (64, 96))
    out = tmp_path / "rows.jsonl"
    script.main(model, backbone, "plain,mesa8", 1, "float32", out)
    plain, mesa = records.read(out)
    assert (plain["model"], plain["backbone"], plain["height"]) == (model, backbone, 64)
    assert 0 < mesa["saved_bytes"] < plain["saved_bytes"] / 2


def test_pairs_are_those_of_the_command_line():
    assert script.chosen("", "") == script.PAIRS
    assert script.chosen("faster_rcnn", "") == [("faster_rcnn", "litv2_s")]
    assert script.chosen("retinanet", "a,b:w4") == [("retinanet", "a"), ("retinanet", "b:w4")]
    with pytest.raises(
        SystemExit, match="dense: no model 'yolo'; choose from retinanet, mask_rcnn"
    ):
        script.chosen("yolo", "")
    attention = script.body_of("litv2_tiny:w4").layers[2].blocks[0].attn
    assert attention.window == 4


def test_the_table_of_bytes_has_a_line_for_each_dtype():
    common = {
        "model": "retinanet",
        "backbone": "resnet50",
        "batch_size": 2,
        "height": 8,
        "width": 9,
    }
    common |= {"parts": {"body": 1, "neck": 2, "head": 3}, "device": "x", "device_type": "cpu"}
    common |= {"threads": 1, "versions": {"torch": "2"}, "commit": "c", "date": "2026-01-01"}
    rows = [
        {**common, "dtype": dtype, "method": method, "saved_bytes": size << 20}
        for dtype, sizes in (("bfloat16", (6, 3)), ("float32", (8, 2)))
        for method, size in zip(("plain", "mesa8"), sizes, strict=True)
    ]
    lines = dense.render(rows).splitlines()
    assert [line.split(" | ")[3] for line in lines[2:4]] == ["float32", "bfloat16"]
    assert [line.rsplit(" | ", 1)[1] for line in lines[2:4]] == [
        "2.0 MiB (4.00x less) |",
        "3.0 MiB (2.00x less) |",
    ]
    assert lines[-1].endswith("x, 1 threads, PyTorch 2, commit c, 2026-01-01.")
    rows[-1] |= {"commit": "d", "date": "2026-02-03"}
    assert (
        dense.render(rows)
        .splitlines()[-1]
        .endswith("x, 1 threads, PyTorch 2, commits c, d, 2026-01-01 to 2026-02-03.")
    )


def test_the_table_of_trained_quickstarts():
    common = {"pictures": 9, "held_out": 4, "steps": 10, "saved_bytes": 2**20, "device": "x"}
    common |= {
        "device_type": "cpu",
        "threads": 1,
        "versions": {"torch": "2"},
        "commit": "c",
        "date": "2026-01-01",
    }
    rows = [
        {
            **common,
            "task": task,
            "policy": policy,
            "seed": seed,
            "train_loss": 0.5,
            name: 0.1 * (seed + 1),
        }
        for task, name in (("segmentation", "miou"), ("detection", "ap"))
        for policy in ("mesa8", "plain")
        for seed in (0, 1)
    ]
    lines = dense_training.render(rows).splitlines()
    assert (
        lines[2]
        == "| detection | plain | 0, 1 | 10 | 1.0 MiB | 0.5000 | AP 15.0 % (10.0 to 20.0) |"
    )
    assert [line.split(" | ")[:2] for line in lines[3:6]] == [
        ["| detection", "mesa8"], ["| segmentation", "plain"], ["| segmentation", "mesa8"],
    ]  # fmt: skip
