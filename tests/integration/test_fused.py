"""`Policy(forward="fused")`, whose norms and activations make their codes in the pass that computes them, in
the setups that meet its kernels: equal to PyTorch to rounding, and the bytes of the exact forward."""

import contextlib
import dataclasses

import pytest
import torch
from integration_models import BOUND, EIGHT, RECOMPUTE, Net, batch, distance, gradients, step
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import mesa_train

EXACT = {"mesa8": EIGHT, "mesa8-recompute": RECOMPUTE}


def checkpointed(reentrant):
    return lambda block, x: checkpoint(block, x, use_reentrant=reentrant)


SETUPS = {
    "eager": {},
    "bf16 autocast": {"cast": True},
    "non-reentrant checkpoints": {"around": checkpointed(False)},
    "reentrant checkpoints": {"around": checkpointed(True)},
    "save_on_cpu": {"offload": True},
}


@pytest.mark.parametrize("preset", EXACT)
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.compatibility('Policy(forward="fused")', "{setup}")
def test_fused(setup, preset):
    given = SETUPS[setup]
    fused = dataclasses.replace(EXACT[preset], forward="fused")

    def run(policy):
        model = Net(around=given.get("around"))
        if policy is not None:
            mesa_train.wrap(model, policy)
        offload = save_on_cpu() if given.get("offload") else contextlib.nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled="cast" in given), offload:
            return step(model, batch())

    plain, exact, found = run(None), run(EXACT[preset]), run(fused)
    rounding = 2**-7 if "cast" in given else 1e-5
    assert distance(found[1], plain[1]) <= rounding
    assert distance(found[2], plain[2]) <= BOUND[preset] + (rounding if "cast" in given else 0)
    assert found[0] == exact[0]


@pytest.mark.compatibility('Policy(forward="fused")', "gradient accumulation")
def test_fused_accumulation():
    fused = dataclasses.replace(EIGHT, forward="fused")
    sums = []
    for pieces in (1, 4):
        model = mesa_train.wrap(Net(drop=0.0), fused)
        for part in batch().chunk(pieces):
            (model(part).square().mean() / pieces).backward()
        sums.append(gradients(model))
    # Codes belong to a token: the order of sums is all that differs.
    assert distance(*sums) <= 1e-5
