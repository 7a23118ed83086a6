"""A captured step computes what a plain loop computes: shapes, gradients, rates, accumulation."""

import copy
import logging
import types

import pytest
import torch
import torch.nn.functional as F
from captured_models import POLICIES, batches, network
from torch import nn

import mesa_train
from mesa_train import CaptureError


def plain_loop(model, optimizer, data, accumulate=1, clip=None, rates=None, autocast=None):
    """Losses and gradient norms of the loop that the documents show without a capture."""
    losses, norms = [], []
    torch.manual_seed(5)
    for turn, (x, y) in enumerate(data):
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"].fill_(rates[turn])
        if turn % accumulate == 0:
            optimizer.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
            loss = F.cross_entropy(model(x), y)
        (loss / accumulate if accumulate > 1 else loss).backward()
        losses.append(loss.detach())
        if turn % accumulate == accumulate - 1:
            if clip is not None:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
            optimizer.step()
    return losses, norms


def assert_same(model, other):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_optimizer_behind_the_graph(record, policy, accumulate):
    """Two shapes in turns, dropout, clipping: losses, norms and weights of the plain loop."""
    model = network(policy)
    other = copy.deepcopy(model)
    data = batches(18, rows=[8, 8, 5] * 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = record(model, optimizer)
    step = mesa_train.capture_step(
        model, F.cross_entropy, optimizer, accumulate=accumulate, clip_norm=0.1
    )
    expected, norms = plain_loop(
        other, torch.optim.AdamW(other.parameters(), lr=1e-2), data, accumulate, clip=0.1
    )
    torch.manual_seed(5)
    found = []
    for turn, (x, y) in enumerate(data):
        found.append(step(x, y))
        assert step.completed is (turn % accumulate == accumulate - 1)
        if step.completed:
            assert torch.equal(step.grad_norm, norms[turn // accumulate])
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert_same(model, other)
    assert recorder.log.count("capture") == step.graphs == 2
    assert recorder.log.count("eager") == 6
    assert recorder.log.count("replay") == 12


@pytest.mark.usefixtures("capturable_on_cpu")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_the_optimizer_in_a_graph_follows_a_schedule_of_floats(record, accumulate, fused):
    model = network("mesa8")
    other = copy.deepcopy(model)
    data = batches(16, rows=[8, 8, 8, 5] * 4)
    rates = [1e-2 * (0.7 ** (turn // accumulate)) for turn in range(16)]
    options = {"capturable": True, "fused": fused, "foreach": not fused}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, **options)
    reference = torch.optim.AdamW(
        other.parameters(), lr=torch.tensor(1.0), **options, weight_decay=0.01
    )
    recorder = record(model, optimizer)
    step = mesa_train.capture_step(
        model, F.cross_entropy, optimizer, accumulate=accumulate, clip_norm=0.5
    )
    reference._warned_capturable_if_run_uncaptured = True
    losses, norms = plain_loop(other, reference, data, accumulate, clip=0.5, rates=rates)
    torch.manual_seed(5)
    found = []
    for turn, (x, y) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = rates[turn]
        assert torch.equal(step(x, y), losses[turn])
        if step.completed:
            found.append(step.grad_norm)
        assert optimizer.param_groups[0]["lr"] == rates[turn], "the schedule sees its own number"
    assert torch.equal(torch.stack(found), torch.stack(norms)), "each norm is a tensor of its own"
    assert_same(model, other)
    assert recorder.log.count("capture") == 3, "two shapes and one optimizer"


@pytest.mark.usefixtures("capturable_on_cpu")
def test_a_rate_that_is_a_tensor_already(record):
    model = network()
    rate = torch.tensor(1e-2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, capturable=True)
    recorder = record(model, optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = mesa_train.capture_step(model, F.cross_entropy, optimizer, warmup=1)
    for x, y in batches(4):
        step(x, y)
        schedule.step()
    assert recorder.log.count("replay") == 3 + 3
    before = copy.deepcopy(model)
    rate.zero_()
    step(*batches(1)[0])
    assert_same(model, before)


@pytest.mark.usefixtures("capturable_on_cpu")
def test_a_changed_constant_is_an_error(record):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    record(model, optimizer)
    step = mesa_train.capture_step(model, F.cross_entropy, optimizer, warmup=1)
    for x, y in batches(3):
        step(x, y)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    message = r"param_groups\[0\]\['weight_decay'\] has changed from 0.01 to 0.3.*reset\(\)"
    with pytest.raises(CaptureError, match=message):
        step(*batches(1)[0])
    step.reset()
    step(*batches(1)[0])


@pytest.mark.usefixtures("capturable_on_cpu")
def test_loading_an_optimizer_captures_again(record):
    """A loaded state has new tensors. A graph of the old ones would leave the weights alone."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    record(model, optimizer)
    step = mesa_train.capture_step(model, F.cross_entropy, optimizer, warmup=1)
    for x, y in batches(3):
        step(x, y)
    assert step.graphs == 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step.graphs == 0
    other, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    reference = torch.optim.AdamW(other.parameters(), lr=torch.tensor(1e-3), capturable=True)
    reference._warned_capturable_if_run_uncaptured = True
    reference.load_state_dict(state)
    for group in reference.param_groups:
        group["lr"] = torch.tensor(1e-3)
    plain_loop(other, reference, batches(3))
    torch.manual_seed(5)
    for x, y in batches(3):
        step(x, y)
    assert_same(model, other)


def test_the_users_own_optimizer(record):
    """Without an optimizer the gradients are the step's; zero_grad does not lose them."""
    model = network()
    other = copy.deepcopy(model)
    record(model)
    step = mesa_train.capture_step(model, F.cross_entropy, warmup=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(5)
    for x, y in batches(6):
        step(x, y)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    plain_loop(other, torch.optim.SGD(other.parameters(), lr=0.1), batches(6))
    assert_same(model, other)


def test_autocast_covers_forward_and_loss(record):
    model = network("mesa8")
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    record(model, optimizer)
    step = mesa_train.capture_step(model, F.cross_entropy, optimizer, autocast=torch.bfloat16)
    reference = torch.optim.AdamW(other.parameters(), lr=1e-2)
    losses, _ = plain_loop(other, reference, batches(6), autocast=torch.bfloat16)
    torch.manual_seed(5)
    assert [step(x, y).item() for x, y in batches(6)] == [loss.item() for loss in losses]
    assert_same(model, other)


def test_autocast_caches_no_weight(record):
    """A cast of a weight from before a capture would be read by all its replays."""
    caches = []

    def loss(output, y):
        caches.append(torch.is_autocast_cache_enabled())
        return F.cross_entropy(output, y)

    model = network()
    record(model)
    step = mesa_train.capture_step(model, loss, autocast=torch.bfloat16, warmup=1)
    for x, y in batches(3):
        step(x, y)
    assert set(caches) == {False}


def test_a_scaler_scales_in_the_graph_and_steps_behind_it(record):
    """The scale grows every two steps; a batch of infinities is skipped and halves the scale."""
    model = network()
    other = copy.deepcopy(model)
    made = {"init_scale": 4.0, "growth_interval": 2}
    scaler, reference = [torch.amp.GradScaler("cpu", **made) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin = torch.optim.SGD(other.parameters(), lr=0.1)
    record(model, optimizer)
    step = mesa_train.capture_step(
        model, F.cross_entropy, optimizer, scaler=scaler, clip_norm=0.5, warmup=1
    )
    data = batches(6)
    data[4] = (data[4][0] * float("inf"), data[4][1])
    torch.manual_seed(5)
    scales = []
    for x, y in data:
        step(x, y)
        scales.append(scaler.get_scale())
    torch.manual_seed(5)
    for x, y in data:
        twin.zero_grad()
        reference.scale(F.cross_entropy(other(x), y)).backward()
        reference.unscale_(twin)
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        reference.step(twin)
        reference.update()
    assert scales == [4, 8, 8, 16, 8, 8]
    assert_same(model, other)


class WithLoss(nn.Module):
    """A model that computes its loss, as those of transformers do."""

    def __init__(self, answer):
        super().__init__()
        self.inner, self.answer = nn.Linear(6, 4), answer

    def forward(self, pixels, labels):
        return self.answer(F.cross_entropy(self.inner(pixels), labels))


@pytest.mark.parametrize(
    "answer",
    [lambda v: v, lambda v: {"loss": v}, lambda v: types.SimpleNamespace(loss=v)],
    ids=["scalar", "mapping", "object"],
)
def test_a_model_with_its_own_loss_takes_names(record, answer):
    torch.manual_seed(0)
    model = WithLoss(answer)
    recorder = record(model)
    step = mesa_train.capture_step(model, warmup=1)
    for x, y in batches(3):
        loss = step(labels=y, pixels=x)
        assert torch.equal(loss, F.cross_entropy(model.inner(x), y))
        assert not loss.requires_grad
    assert recorder.log == ["eager", "capture", "replay", "replay"]


def test_losses_are_new_tensors_and_batches_may_be_reused(record):
    model = network()
    record(model)
    step = mesa_train.capture_step(model.eval(), F.cross_entropy, warmup=1)
    (x, y), (other, _) = batches(2)
    step(x, y)
    first, buffer = step(x, y), x.clone()
    x.copy_(other)
    second = step(x, y)
    assert not torch.equal(first, second)
    x.copy_(buffer)
    assert torch.equal(step(x, y), first)


def test_a_graph_for_each_layout_mode_and_dtype(record):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    x, y = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    model(x)
    recorder = record(model)
    step = mesa_train.capture_step(model, F.cross_entropy, warmup=1)
    for _ in range(2):
        step(x, y)
    assert step.graphs == 1
    step(x.clone(), y.clone())
    assert step.graphs == 1
    for _ in range(2):
        step(x.to(memory_format=torch.channels_last), y)
    assert step.graphs == 2
    model.eval()
    for _ in range(2):
        step(x, y)
    model.train()
    step(x, y)
    assert step.graphs == 3
    assert recorder.log.count("eager") == 3


def test_too_many_shapes_run_without_a_graph(record, caplog):
    model = network()
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = record(model, optimizer)
    step = mesa_train.capture_step(model, F.cross_entropy, optimizer, warmup=1, max_graphs=2)
    data = batches(12, rows=[8, 7, 6] * 4)
    torch.manual_seed(5)
    with caplog.at_level(logging.WARNING):
        for x, y in data:
            step(x, y)
    assert [r.message for r in caplog.records] == [
        "capture_step: batches have more than max_graphs=2 shapes; further shapes run without a graph"
    ]
    assert step.graphs == 2
    assert recorder.log.count("eager") == 3 + 3
    plain_loop(other, torch.optim.SGD(other.parameters(), lr=0.1), data)
    assert_same(model, other)


@pytest.mark.usefixtures("capturable_on_cpu")
def test_rare_shapes_are_not_captured(record):
    """Nor is the optimizer: without a graph of the backward, its gradients are no static tensors."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    recorder = record(model, optimizer)
    step = mesa_train.capture_step(model, F.cross_entropy, optimizer)
    for x, y in batches(12, rows=list(range(1, 13))):
        step(x, y)
    assert set(recorder.log) == {"eager"}
