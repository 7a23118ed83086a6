"""Gradients of MoCo v3 by way: which are right, and the table of their rows."""

import moco_gradients
import pytest
import torch
from tables.recipes import moco_gradients as table

from mesa_train.utils import records


@pytest.fixture(scope="module")
def rows():
    return {row["way"]: row for row in moco_gradients.measured(12, 4, 0)}


def test_the_ways_that_keep_the_gradient_and_those_that_do_not(rows):
    assert list(rows) == list(moco_gradients.WAYS)
    for way in ("joint", "by view", "by view, chunks", "by view, checkpointing"):
        assert rows[way]["gradient_error"] < 1e-4
        assert rows[way]["loss"] == pytest.approx(rows[way]["reference_loss"], rel=1e-5)
    assert rows["by view"]["same_as_joint"]
    mesa8, mesa4 = (rows[f"by view, {name}"] for name in ("mesa8", "mesa4"))
    assert 1e-4 < mesa8["gradient_error"] < mesa4["gradient_error"] < 0.6
    # The forward of a preset is exact.
    assert mesa8["loss"] == mesa4["loss"] == rows["by view"]["loss"]
    for way in ("accumulation", "caching at the queries"):
        assert rows[way]["gradient_error"] > 0.5


def test_a_step_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = moco_gradients.MoCo(moco_gradients.timm.create_model("moco_vit_tiny"), dim=8, hidden=16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    views = tuple(torch.randn(2, 4, 3, 28, 28))
    moco_gradients.gradients(model, moco_gradients.joint, views, 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_table(rows):
    lines = table.render([{**row, **records.provenance()} for row in rows.values()]).splitlines()
    assert len(lines) == 2 + len(rows) + 2
    assert lines[2].startswith("| joint | ")
    assert lines[2].endswith("| yes |")
    assert " % | no |" in lines[8]
    assert "12 random images in float32, chunks of 4" in lines[-1]
