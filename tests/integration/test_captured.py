"""CUDA graphs: a captured training step of a wrapped model replays as the eager one does."""

import copy

import pytest
import torch
from integration_models import EIGHT, POLICIES, Net, batch, gradients

import mesa_train


@pytest.mark.gpu
@pytest.mark.parametrize("preset", [name for name in POLICIES if name != "paper"])
@pytest.mark.parametrize("forward", ["exact", "fused"])
@pytest.mark.compatibility("CUDA graphs", "a captured step, {forward} forward")
def test_a_captured_step_replays(forward, preset):
    policy = POLICIES[preset]
    if forward == "fused":
        policy = mesa_train.Policy(bits=policy.bits, recompute=policy.recompute, forward="fused")
    eager = mesa_train.wrap(Net(drop=0.0).cuda(), policy)
    captured = copy.deepcopy(eager)
    x = batch().cuda()

    def step(model, x):
        model.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = model(x).float().square().mean()
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(captured, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured, x)
    for seed in (2, 3):
        new = batch(seed=seed).cuda()
        x.copy_(new)
        graph.replay()
        expected = step(eager, new)
        assert torch.equal(loss, expected)
        # Sums over rows may be taken in another order by another stream's kernels.
        difference = (gradients(captured) - gradients(eager)).norm()
        assert difference <= 1e-4 * gradients(eager).norm()


@pytest.mark.gpu
def test_captured_inputs_need_gradients_too():
    """make_graphed_callables, which PyTorch offers for parts of a model."""
    model = mesa_train.wrap(Net(drop=0.0).cuda(), EIGHT)
    x = batch().cuda()
    plain = copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(model, (x.clone(),))
    for run, owner in ((graphed, model), (plain, plain)):
        owner.zero_grad()
        run(x).square().mean().backward()
    difference = (gradients(model) - gradients(plain)).norm()
    assert difference <= 1e-4 * gradients(plain).norm()
