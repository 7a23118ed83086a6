"""Optimisation steps are seen by what they leave in the weights, whoever takes them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mesa_train.engine.step_counter import StepCounter


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 1))


def by_torch(model):
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def behind_the_version(model):
    """As a flat buffer behind the parameters does, or a kernel that gets their address."""
    for p in model.parameters():
        p.data.sub_(0.1 * p.grad)


def by_pointer(model):
    model[0].bias.detach().numpy()[2] += 1.0


def in_backward(model):
    """An optimizer that updates each parameter as soon as its gradient is there."""

    def update(p):
        with torch.no_grad():
            p.sub_(0.1 * p.grad)

    handles = [p.register_post_accumulate_grad_hook(update) for p in model.parameters()]
    model(torch.ones(3, 6)).sum().backward()
    for handle in handles:
        handle.remove()


def by_other_tensors(model):
    """As functional training code does: new parameters each time."""
    for module in (model[0], model[2]):
        module.weight = nn.Parameter(module.weight.detach() - 0.1)


STEPS = [by_torch, behind_the_version, by_pointer, in_backward, by_other_tensors]


@pytest.mark.parametrize("advance", STEPS, ids=lambda f: f.__name__)
def test_a_step_is_seen_once_whoever_takes_it(advance):
    model, steps = net(), StepCounter()
    for number in range(1, 4):
        for _ in range(2):  # micro-batches
            steps.update(model)
            model(torch.ones(3, 6)).sum().backward()
            assert steps.count == number
        advance(model)


def test_what_changes_no_trained_weight_is_no_step():
    model, steps = net(), StepCounter()
    model[0].requires_grad_(False)
    steps.update(model)
    model[0].weight.data.add_(1.0)
    model(torch.ones(3, 6)).sum().backward()
    model.zero_grad()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    steps.update(model)
    assert steps.count == 1


def test_a_weight_that_is_not_a_number_is_no_step():
    model, steps = net(), StepCounter()
    model[2].weight.data.fill_(float("nan"))
    for _ in range(3):
        steps.update(model)
    assert steps.count == 1


def test_a_parameter_of_two_forms_counts_no_form_as_a_step():
    """As under FSDP, whose parameters are now a shard and now whole, and which fills the whole one after
    a step without a trace in its version."""
    model, steps = nn.Linear(6, 4, bias=False), StepCounter()
    whole, shard = model.weight, nn.Parameter(model.weight.detach()[:2].clone())
    for number in range(1, 4):
        for form in (shard, whole, shard, whole):
            model.weight = form
            steps.update(model)
            assert steps.count == number
        whole.data.add_(1.0)
        shard.data.add_(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_and_size(dtype):
    model = nn.ParameterList([torch.zeros(n, 3, dtype=dtype) for n in (0, 1, 7, 300)])
    steps = StepCounter()
    steps.update(model)
    model[3].data.add_(0.5)
    steps.update(model)
    steps.update(model)
    assert steps.count == 2


def test_copies_hold_no_weights():
    model, steps = net(), StepCounter()
    steps.update(model)
    for other in (copy.deepcopy(steps), pickle.loads(pickle.dumps(steps))):
        assert other.count == 1
        assert not other._known
    with torch.device("meta"):
        model = net()
    steps.update(model)
