"""CUDA graphs themselves: a captured step against the same step without a graph, for 20 steps."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mesa_train
from mesa_train import CaptureError, Policy

pytestmark = pytest.mark.gpu

POLICIES = {
    "plain": None,
    "mesa8": Policy(min_bytes=0),
    "mesa6": dataclasses.replace(Policy.preset("mesa6"), min_bytes=0),
    # 4 and 5 bits, with dither.
    "mesa4": dataclasses.replace(Policy.preset("mesa4"), min_bytes=0),
}
STEPS = 20
# Sums over rows may be taken in another order by another stream's kernels. AdamW divides by the
# gradient's size, so such a difference reaches the weights undiminished.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


class Block(nn.Module):
    def __init__(self, width=64, drop=0.1):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.drop(self.proj(attended))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, again=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(12, 64), nn.Linear(64, 10)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.again = again

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return self.head(x.mean(1))


def models(policy, **options):
    model = Net(**options).cuda()
    if POLICIES[policy] is not None:
        mesa_train.wrap(model, POLICIES[policy])
    return model, copy.deepcopy(model)


def batches(count=STEPS):
    made = torch.Generator().manual_seed(1)
    for turn in range(count):
        rows = 16 if turn % 4 else 12
        yield torch.randn(rows, 32, 12, generator=made), torch.randint(10, (rows,), generator=made)


def compare(step, model, other, optimizer, rates=None, own=None, accumulate=1):
    """Captured and ordinary losses on the same data and random numbers, step by step."""
    for turn, (x, y) in enumerate(batches()):
        for group in (*optimizer.param_groups, *(own.param_groups if own is not None else ())):
            group["lr"] = 1e-3 if rates is None else rates[turn]
        torch.manual_seed(turn)
        loss = step(x.pin_memory(), y)
        torch.manual_seed(turn)
        if turn % accumulate == 0:
            optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            expected = F.cross_entropy(other(x.cuda()), y.cuda())
        (expected / accumulate).backward()
        if turn % accumulate == accumulate - 1:
            nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), **CLOSE)
        if turn % 5 == 0:  # equal weights again: roundings of AdamW's steps would add up
            other.load_state_dict(model.state_dict())
    assert step.graphs == 2


@pytest.mark.parametrize("in_graph", [True, False], ids=["optimizer in a graph", "behind it"])
@pytest.mark.parametrize("policy", POLICIES)
def test_twenty_steps(policy, in_graph):
    model, other = models(policy)
    own = torch.optim.AdamW(model.parameters(), capturable=in_graph, fused=True)
    step = mesa_train.capture_step(
        model, F.cross_entropy, own, autocast=torch.bfloat16, clip_norm=1.0
    )
    assert step._update.in_graph is in_graph
    reference = torch.optim.AdamW(other.parameters(), fused=True)
    rates = [1e-3 * 0.9**turn for turn in range(STEPS)]
    compare(step, model, other, reference, rates, own)


def test_accumulation():
    model, other = models("mesa8")
    own = torch.optim.AdamW(model.parameters(), fused=True)
    step = mesa_train.capture_step(
        model, F.cross_entropy, own, autocast=torch.bfloat16, clip_norm=1.0, accumulate=2
    )
    reference = torch.optim.AdamW(other.parameters(), fused=True)
    compare(step, model, other, reference, None, own, accumulate=2)


def test_checkpointing_with_its_random_state():
    """PyTorch captures a checkpoint's random state if the seed does not change in between."""
    model, other = models("mesa8", again=True)
    own = torch.optim.AdamW(model.parameters(), fused=True)
    step = mesa_train.capture_step(
        model, F.cross_entropy, own, autocast=torch.bfloat16, clip_norm=1.0
    )
    reference = torch.optim.AdamW(other.parameters(), fused=True)
    compare(step, model, other, reference, None, own)


def test_dropout_differs_from_step_to_step():
    model, _ = models("plain")
    step = mesa_train.capture_step(model, F.cross_entropy, warmup=1)
    x, y = next(batches())
    losses = {step(x, y).item() for _ in range(6)}
    assert len(losses) == 6


def test_a_read_of_the_device_is_one_line_and_the_process_goes_on():
    model, _ = models("mesa8")
    x, y = next(batches())

    def loss(output, labels):
        if output.sum().item() > 1e9:
            return output.sum()
        return F.cross_entropy(output, labels)

    step = mesa_train.capture_step(model, loss, warmup=1)
    step(x, y)
    stream = torch.cuda.current_stream()
    with pytest.raises(CaptureError, match="cannot capture forward and backward") as caught:
        step(x, y)
    assert "\n" not in str(caught.value)
    assert torch.cuda.current_stream() == stream
    F.cross_entropy(model(x.cuda()), y.cuda()).backward()
    torch.cuda.synchronize()
