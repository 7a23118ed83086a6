"""torch.compile, whole and block by block, of a wrapped model in each setup that PyTorch compiles:
checkpointing, autocast, DDP, FSDP2 and accumulation. `aot_eager` runs every step of compilation but the
code generator, which `tests/engine/test_compile.py` covers."""

import functools

import pytest
import torch
import torch.distributed as dist
from integration_models import BOUND, Net, batch, distance, gradients, saved_bytes
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mesa_train
from mesa_train import Policy

pytestmark = [
    pytest.mark.slow,
    # Dynamo reads deprecated attributes of torch while it traces.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
    ),
]

# Compiled norms differ from eager ones by a rounding, and a code by a step where it lies between two.
POLICIES = {
    "lossless": Policy(bits=32),
    "mesa8": Policy(min_bytes=0),
    "mesa8-recompute": Policy(min_bytes=0, recompute="linear"),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def whole(model):
    return torch.compile(model, backend="aot_eager")


def regional(model):
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    return model


def train(forward, model):
    """Losses of two steps, and the gradients of the first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, first = [], None
    for number in range(2):
        loss = forward(batch(seed=number)).float().square().mean()
        loss.backward()
        if first is None:
            first = torch.cat(
                [
                    getattr(p.grad, "full_tensor", lambda p=p: p.grad)().flatten().double()
                    for p in model.parameters()
                ]
            )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, first


def around_blocks(reentrant):
    return lambda block, x: checkpoint(block, x, use_reentrant=reentrant)


def net(around=None):
    # One block: tracing is what takes the time.
    return Net(depth=1, drop=0.0, around=around)


@pytest.fixture(scope="module")
def expected():
    model = net()
    return train(model, model)


def assert_close(found, expected, preset):
    assert found[0] == pytest.approx(expected[0], rel=0.01 if preset != "lossless" else 1e-4)
    assert distance(found[1], expected[1]) <= max(BOUND[preset], 1e-5)


EXTENT = pytest.mark.parametrize("compiled", [whole, regional], ids=["whole", "regional"])


@pytest.mark.parametrize("preset", ["lossless", "mesa8"])
@EXTENT
@pytest.mark.compatibility("torch.compile", "alone, {extent}")
def test_alone(expected, compiled, preset):
    model = mesa_train.wrap(net(), POLICIES[preset])
    assert_close(train(compiled(model), model), expected, preset)


@EXTENT
@pytest.mark.compatibility("torch.compile", "keeps codes, {extent}")
def test_keeps_codes(compiled):
    plain, ours = net(), mesa_train.wrap(net(), POLICIES["mesa8"])
    sizes = []
    for model in (plain, ours):
        forward = compiled(model)
        forward(batch())
        sizes.append(saved_bytes(lambda f=forward: f(batch()))[0])
        torch._dynamo.reset()
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("preset", ["mesa8"])
@EXTENT
@pytest.mark.compatibility("torch.compile", "activation checkpointing, {extent}")
def test_checkpointed(expected, compiled, preset):
    model = mesa_train.wrap(net(around_blocks(False)), POLICIES[preset])
    assert_close(train(compiled(model), model), expected, preset)


@EXTENT
@pytest.mark.compatibility("torch.compile", "autocast, {extent}")
def test_autocast(compiled):
    model, plain = mesa_train.wrap(net(), POLICIES["mesa8"]), net()
    results = []
    for forward, owner in ((compiled(model), model), (plain, plain)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(batch()).float().square().mean()
        loss.backward()
        results.append(gradients(owner))
    assert distance(*results) <= BOUND["mesa8"]


@EXTENT
@pytest.mark.compatibility("torch.compile", "wrapped after compiling, {extent}")
def test_wrapped_after(expected, compiled):
    """`wrap` of a compiled model: the next call traces again."""
    model = net()
    forward = compiled(model)
    forward(batch())
    mesa_train.wrap(forward if compiled is whole else model, POLICIES["mesa8"])
    assert_close(train(forward, model), expected, "mesa8")


@pytest.mark.parametrize("preset", ["mesa8"])
@EXTENT
@pytest.mark.compatibility("torch.compile", "DDP, {extent}")
def test_ddp(group, expected, compiled, preset):
    model = mesa_train.wrap(net(), POLICIES[preset])
    if compiled is whole:
        forward = whole(DistributedDataParallel(model))
    else:
        forward = DistributedDataParallel(regional(model))
    assert_close(train(forward, model), expected, preset)


@pytest.mark.parametrize("preset", ["mesa8", "mesa8-recompute"])
@pytest.mark.compatibility("torch.compile", "FSDP2, regional")
def test_fsdp_regional(group, expected, preset):
    """Per block, as PyTorch recommends for FSDP2."""
    model = regional(mesa_train.wrap(net(), POLICIES[preset]))
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    assert_close(train(model, model), expected, preset)


@functools.cache
def _plain_accumulated():
    model = net()
    for part in batch().chunk(2):
        (model(part).square().mean() / 2).backward()
    return gradients(model)


@EXTENT
@pytest.mark.compatibility("torch.compile", "gradient accumulation, {extent}")
def test_accumulation(compiled):
    model = mesa_train.wrap(net(), POLICIES["mesa8"])
    forward = compiled(model)
    for part in batch().chunk(2):
        (forward(part).square().mean() / 2).backward()
    assert distance(gradients(model), _plain_accumulated()) <= BOUND["mesa8"]
