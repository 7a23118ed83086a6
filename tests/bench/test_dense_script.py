"""The counted steps save what the real models save."""

import pytest
import torch
from dense import parts
from tables.dense import dense, dense_training

from mesa_train.measure.footprint import footprint
from mesa_train.models.dense import mask_rcnn, retinanet
from mesa_train.training.dense.memory import RegionStep, RetinaNetStep


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
