"""The counted steps save what the real models save."""

import pytest
import torch
from dense import parts

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
