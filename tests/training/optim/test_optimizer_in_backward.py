"""Optimizer steps inside the backward: equal to the papers' formulas, unbiased in bfloat16, one gradient at a time."""

import pytest
import timm
import torch
from torch import nn

import mesa_train
import mesa_train.models
from mesa_train.measure.optimizer_states import in_backward_bytes
from mesa_train.models.vit22b.model import sigmoid_loss
from mesa_train.training.optim import optimizer_in_backward as in_backward
from mesa_train.training.optim.optimizer_in_backward import (
    InBackward,
    round_to_bfloat16,
    write_rounded,
)
from mesa_train.training.vit22b.schedule import groups


def test_rounding_is_to_a_neighbour_and_right_on_average():
    value = torch.tensor([1.001, -3.1234, 1e-30, 0.0, 2.0, 65280.5]).repeat(20_000, 1)
    rounded = round_to_bfloat16(value).float()
    low = value[0].to(torch.bfloat16).float()
    for column in range(value.shape[1]):
        seen = rounded[:, column].unique()
        assert len(seen) == (1 if low[column] == value[0, column] else 2)
        assert seen.min() <= value[0, column] <= seen.max()
    # The mean of 20,000 draws of a two-point distribution with step 2^-7: four deviations.
    error = (rounded.mean(0) - value[0]).abs() / value[0].abs().clamp_min(1e-30)
    assert (error < 4 * 2**-8 / 20_000**0.5).all()
    special = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert torch.equal(round_to_bfloat16(special).nan_to_num(7), special.bfloat16().nan_to_num(7))
    with pytest.raises(TypeError, match=r"takes float32, got torch\.float64"):
        round_to_bfloat16(torch.zeros(2, dtype=torch.float64))


def test_small_updates_add_up():
    weight = torch.ones(1000, dtype=torch.bfloat16)
    for _ in range(100):
        write_rounded(weight, weight.float() - 1e-4)  # a fortieth of bfloat16's step
    # To nearest not one of the updates would be seen. 0.0003 is two deviations of this mean.
    assert weight.float().mean().item() == pytest.approx(0.99, abs=1e-3)
    plain = torch.ones(4, dtype=torch.bfloat16)
    assert torch.equal(plain - torch.tensor(1e-4, dtype=torch.bfloat16), plain)


def steps(method, parameters, gradients, **options):
    """Parameters after one step for each set of gradients."""
    made = [nn.Parameter(p.clone()) for p in parameters]
    stepper = InBackward([{"params": made, "weight_decay": 0.1}], lr=0.01, method=method, **options)
    for given in gradients:
        stepper.begin()
        sum((p * g).sum() for p, g in zip(made, given, strict=True)).backward()
        assert all(p.grad is None for p in made)
    return made, stepper


def example(count=3):
    torch.manual_seed(0)
    shapes = [(7, 5), (6,), (4, 3, 2)]
    return [torch.randn(s) for s in shapes], [
        [torch.randn(s) for s in shapes] for _ in range(count)
    ]


@pytest.mark.parametrize("chunk", [1 << 24, 10])
def test_factored_is_adafactor(chunk, monkeypatch):
    monkeypatch.setattr(in_backward, "UPDATE", chunk)
    parameters, gradients = example()
    found, stepper = steps("factored", parameters, gradients)
    for index, expected in enumerate(parameters):
        value = expected.reshape(expected.shape[0], -1) if expected.dim() > 1 else expected
        value = value.double().clone()
        row = column = mean = 0.0
        for t, given in enumerate(gradients, 1):
            g = given[index].reshape(value.shape).double()
            beta = min(1 - t**-0.8, 0.999)
            if value.dim() > 1:
                row = beta * row + (1 - beta) * (g**2).mean(1)
                column = beta * column + (1 - beta) * (g**2).mean(0)
                change = g / torch.sqrt(torch.outer(row, column) / row.mean())
            else:
                mean = beta * mean + (1 - beta) * g**2
                change = g / mean.sqrt()
            change = change / max(1.0, change.square().mean().sqrt().item())
            value = value * (1 - 0.01 * 0.1) - 0.01 * change
        torch.testing.assert_close(
            found[index].detach().reshape(value.shape).double(), value, rtol=1e-5, atol=1e-6
        )
    last = sum(g.square().sum() for g in gradients[-1]).sqrt()
    assert stepper.norm().item() == pytest.approx(last.item(), rel=1e-5)


@pytest.mark.parametrize(("update", "expected"), [(1, [1] * 5), (8, [2, 2, 1]), (99, [5])])
def test_an_update_takes_a_few_rows_at_a_time(update, expected, monkeypatch):
    """So its temporaries are of UPDATE elements, or of one row; a vector is taken whole."""
    monkeypatch.setattr(in_backward, "UPDATE", update)
    weight, grad = torch.randn(5, 4), torch.randn(5, 4).bfloat16()
    chunks = list(in_backward._chunks(weight, grad))
    assert [len(w) for _, _, w in chunks] == expected
    assert torch.equal(torch.cat([g for _, g, _ in chunks]), grad.float())
    assert torch.equal(torch.cat([weight[part] for part, *_ in chunks]), weight)
    assert len(list(in_backward._chunks(weight[:, 0], grad[:, 0]))) == 1


def test_lion_is_lion_but_for_the_codes_of_its_moment():
    parameters, gradients = example(1)
    found, _ = steps("lion", parameters, gradients)
    for value, start, grad in zip(found, parameters, gradients[0], strict=True):
        expected = start * (1 - 0.01 * 0.1) - 0.01 * grad.sign()
        torch.testing.assert_close(value.detach(), expected)
    # A constant gradient: the moment's sign never changes, whatever its codes.
    found, stepper = steps("lion", parameters, gradients * 20)
    moment = stepper.states[0]["moment"][0]
    assert moment[0].dtype is torch.uint8
    codec = in_backward.Affine(8, 128)
    decoded = codec.decode(moment, 5, torch.float32)
    expected = gradients[0][0] * (1 - 0.99**20)
    # Stochastic rounding of 1/255 of the range each step, averaged away by the decay.
    assert (decoded - expected).abs().max() < 0.1


def model_of(dtype):
    torch.manual_seed(0)
    model = timm.create_model("vit_22b_tiny", num_classes=10, img_size=56, dtype=dtype)
    nn.init.normal_(model.head.weight, std=0.05)
    nn.init.zeros_(model.head.bias)
    return model.train()


@pytest.mark.slow
@pytest.mark.parametrize("method", in_backward.METHODS)
@pytest.mark.parametrize("policy", [None, "mesa8", "mesa8-recompute"])
def test_a_model_in_bfloat16_learns_and_no_gradients_pile_up(method, policy):
    model = model_of(torch.bfloat16)
    if policy:
        mesa_train.wrap(model, policy)
    model.set_grad_checkpointing(policy == "mesa8")
    stepper = InBackward(
        groups(model, 0.0, 0.0), lr=3e-3 if method == "factored" else 3e-4, method=method
    )
    alive = []

    def count(*_):
        alive.append(sum(p.grad is not None for p in model.parameters()))

    for block in model.blocks:
        block.in_proj.weight.register_post_accumulate_grad_hook(count)
    images = torch.randn(16, 3, 56, 56, dtype=torch.bfloat16)
    labels, losses = torch.arange(16) % 10, []
    for _ in range(12):
        stepper.begin()
        loss = sigmoid_loss(model(images), labels)
        loss.backward()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    # At the very moment when the largest gradient is complete, it is gone and no other is there.
    assert max(alive) == 0
    assert all(p.dtype is torch.bfloat16 and p.grad is None for p in model.parameters())


def test_state_is_as_small_as_promised_and_resumes():
    parameters, gradients = example(4)
    whole, _ = steps("lion", parameters, gradients, seed=3)
    half, first = steps("lion", parameters, gradients[:2], seed=3)
    state = first.state_dict()
    first.remove()
    stepper = InBackward([{"params": half, "weight_decay": 0.1}], lr=0.01, method="lion", seed=3)
    stepper.load_state_dict(state)
    for given in gradients[2:]:
        stepper.begin()
        sum((p * g).sum() for p, g in zip(half, given, strict=True)).backward()
    assert all(torch.equal(a, b) for a, b in zip(half, whole, strict=True))
    kept = sum(t.nbytes for s in stepper.states for part in s["moment"].values() for t in part)
    assert kept == sum(in_backward_bytes(p.shape, "lion") for p in half)
    with torch.device("meta"):
        model = timm.create_model("vit_22b")
    count = sum(p.numel() for p in model.parameters())
    lion, factored = (
        sum(in_backward_bytes(p.shape, m) for p in model.parameters()) for m in ("lion", "factored")
    )
    assert lion == pytest.approx(1.03125 * count, rel=1e-3)
    assert factored < 5e-3 * count


def test_mistakes_are_named():
    weight = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match="method must be one of factored, lion, got 'adam'"):
        InBackward([{"params": [weight]}], 0.1, "adam")
    stepper = InBackward([{"params": [weight]}], 0.1)
    with pytest.raises(ValueError, match="stepped in the backward already"):
        InBackward([{"params": [weight]}], 0.1)
    with pytest.raises(RuntimeError, match=r"begin\(\) must be called"):
        weight.sum().backward()
    with pytest.raises(ValueError, match="a state of 'lion' with 1 parameters does not fit"):
        stepper.load_state_dict({"method": "lion", "steps": 1, "states": [{}]})
    stepper.remove()
    weight.grad = None
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 2))
