"""LARS and the schedules give the official numbers."""

import moco_cases as cases
import pytest
import torch

from mesa_train.models.moco import LARS, adamw, learning_rate, momentum

GOLDEN = cases.arrays("optim")


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("vit300", (2.4e-3, 40, 300, 0.99)),
        ("r50_100", (9.6, 10, 100, 0.99)),
        ("r50_1000", (4.8, 10, 1000, 0.996)),
    ],
)
def test_schedules(name, recipe):
    peak, warmup, epochs, base = recipe
    at = GOLDEN[f"{name}_epoch"]
    rates = [learning_rate(e, peak=peak, warmup=warmup, epochs=epochs) for e in at]
    assert rates == pytest.approx(GOLDEN[f"{name}_lr"], rel=1e-12, abs=1e-15)
    shares = [momentum(e, base=base, epochs=epochs) for e in at]
    assert shares == pytest.approx(GOLDEN[f"{name}_m"], rel=1e-12)
    assert momentum(7.0, base=base, epochs=epochs, cosine=False) == base


def lars(weights, **changes):
    given = {"lr": 4.8, "weight_decay": 1e-2, "momentum": 0.9, "trust": 0.001}
    return LARS(weights, **given | changes)


def test_lars():
    shapes = [(4, 5), (5,), (3, 2)]
    weights = [
        torch.nn.Parameter(cases.normal(50 + i, *shape, dtype="float64"))
        for i, shape in enumerate(shapes[:2])
    ]
    weights.append(torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)))
    optimizer = lars(weights)
    for step in range(3):
        for i, p in enumerate(weights):
            p.grad = cases.normal(50 + 10 * (step + 1) + i, *shapes[i], dtype="float64")
        if step == 1:
            weights[1].grad = None
        optimizer.step()
    for i, p in enumerate(weights):
        assert p.detach().numpy() == pytest.approx(GOLDEN[f"lars_p{i}"], rel=1e-12, abs=1e-14)


def test_lars_by_hand():
    p = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    p.grad = torch.tensor([[0.0, 2.0]])
    LARS([p], lr=1.0, momentum=0.0, trust=0.1).step()
    # |p| = 5 and |g| = 2, so the gradient becomes 0.1 * 5 / 2 * (0, 2).
    assert p.tolist() == [[3.0, pytest.approx(3.5)]]
    bias = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    bias.grad = torch.tensor([0.0, 2.0])
    LARS([bias], lr=1.0, weight_decay=9.0).step()
    assert bias.tolist() == [3.0, 2.0]  # neither decay nor trust
    with pytest.raises(ValueError, match="trust must not be negative, got -1"):
        LARS([bias], lr=1.0, trust=-1)


def test_adamw_decays_everything_that_is_trained():
    model = cases.tiny()
    (group,) = adamw(model, 1e-3).param_groups
    assert group["weight_decay"] == 0.1
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in group["params"]} == trained
    assert id(model.base_encoder.cls_token) in trained


@pytest.mark.parametrize(("warmup", "epochs"), [(5, 5), (6, 5), (-1, 5), (0, 0)])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup, epochs):
    with pytest.raises(ValueError, match="warmup must be at least 0 and below epochs, got warmup="):
        learning_rate(5, peak=1.0, warmup=warmup, epochs=epochs)


def test_the_rate_stays_at_0_after_the_run():
    assert [learning_rate(e, peak=1.0, warmup=0, epochs=5) for e in (5, 6, 9)] == [0, 0, 0]
    assert learning_rate(0, peak=1.0, warmup=0, epochs=5) == 1
