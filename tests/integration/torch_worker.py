"""Worker: DDP and FSDP2 (`fully_shard`) around and inside `wrap`, every variant without mesa_train too."""

import contextlib
import functools
import sys

import torch
from integration_models import Net, batch, distance
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from worker_tools import (
    STEPS,
    alone,
    criterion,
    frozen,
    moved,
    run,
    setups,
    share,
    start,
    steps_seen,
    train,
    unused,
    wrapped,
)


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def identity(model):
    return model


def checkpointed(model):
    make = functools.partial(
        checkpoint_wrapper.checkpoint_wrapper,
        checkpoint_impl=checkpoint_wrapper.CheckpointImpl.NO_REENTRANT,
    )
    checkpoint_wrapper.apply_activation_checkpointing(
        model, make, lambda m: type(m).__name__ == "Block"
    )
    return model


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def plain_state(state):
    return {
        n.replace("_checkpoint_wrapped_module.", ""): v
        for n, v in state.items()
        if "unused" not in n
    }


def finish(model, parallel, state, cast, reference):
    optimizer = sgd(parallel)

    def advance():
        optimizer.step()
        optimizer.zero_grad()

    losses, kept = train(parallel, lambda loss: loss.backward(), advance, cast=cast)
    expected, weights = reference
    return {
        "losses": losses,
        "alone": expected,
        "kept": kept,
        "offloaded": moved(state(), weights),
        "steps": steps_seen(parallel) or steps_seen(model),
    }


# --- DDP ---


def ddp(
    preset, after, prepare=identity, cast=contextlib.nullcontext, reference=identity, **keywords
):
    model = prepare(Net(drop=0.0))
    if not after:
        wrapped(model, preset)
    parallel = DistributedDataParallel(model, **keywords)
    if after:
        parallel = wrapped(parallel, preset)
    return finish(
        model,
        parallel,
        lambda: plain_state(model.state_dict()),
        cast,
        alone(prepare=reference, cast=cast),
    )


def ddp_no_sync(preset, after):
    """Two micro-batches of one row each with `no_sync`, against the batch at once."""
    gradients = []
    for pieces in (1, 2):
        model = Net(drop=0.0)
        if not after:
            wrapped(model, preset)
        parallel = DistributedDataParallel(model)
        if after:
            wrapped(parallel, preset)
        parts = share(batch()).chunk(pieces)
        for number, part in enumerate(parts):
            last = number == pieces - 1
            with contextlib.nullcontext() if last else parallel.no_sync():
                (criterion(parallel(part)) / pieces).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return {"distance": distance(gradients[1], gradients[0])}


# --- FSDP2 ---


def shard(model, units="blocks", **keywords):
    found = [m for m in model.modules() if type(m).__name__ == "Block"]
    if units == "layers":
        found = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    for module in found:
        fully_shard(module, **keywords)
    return fully_shard(model, **keywords)


def full(model):
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    return get_model_state_dict(model, options=options)


def fsdp(
    preset,
    after,
    prepare=identity,
    cast=contextlib.nullcontext,
    reference=identity,
    meta=False,
    **keywords,
):
    with torch.device("meta") if meta else contextlib.nullcontext():
        model = prepare(Net(drop=0.0))
    if not after:
        wrapped(model, preset)
    shard(model, **keywords)
    if after:
        wrapped(model, preset)
    if meta:
        model.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, Net(drop=0.0).state_dict(), options=options)
    return finish(
        model, model, lambda: plain_state(full(model)), cast, alone(prepare=reference, cast=cast)
    )


def fsdp_state_dicts(preset, after):
    """A wrapped and sharded model's weights into a plain one, and a plain one's into it."""
    model = Net(drop=0.0)
    if not after:
        wrapped(model, preset)
    shard(model)
    if after:
        wrapped(model, preset)
    criterion(model(share(batch()))).backward()
    plain = Net(drop=0.0)
    plain.load_state_dict(full(model))
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    set_model_state_dict(model, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
    same = all(torch.equal(v, plain.state_dict()[n]) for n, v in full(model).items())
    with torch.no_grad():
        x = batch()
        return {"same": same, "forward": bool(torch.equal(model(x), plain(x)))}


def fsdp_no_sync(preset, after):
    gradients = []
    for pieces in (1, 2):
        model = Net(drop=0.0)
        if not after:
            wrapped(model, preset)
        shard(model)
        if after:
            wrapped(model, preset)
        for number, part in enumerate(share(batch()).chunk(pieces)):
            model.set_requires_gradient_sync(number == pieces - 1)
            (criterion(model(part)) / pieces).backward()
        gradients.append(torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]))
    return {"distance": distance(gradients[1], gradients[0])}


def fsdp_steps(preset, after):
    """The steps counted while parameters stay whole between micro-batches, and are shards between steps."""
    model = wrapped(shard(Net(drop=0.0)), preset)
    optimizer, seen = sgd(model), []
    for number in range(6):
        last = number % 2 == 1
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        criterion(model(share(batch(seed=number)))).backward()
        seen.append(steps_seen(model))
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return {"steps": seen}


VARIANTS = {
    "ddp": ddp,
    "ddp bf16": functools.partial(ddp, cast=bf16),
    "ddp unused": functools.partial(ddp, prepare=unused, find_unused_parameters=True),
    "ddp static": functools.partial(ddp, static_graph=True),
    "ddp static checkpointed": functools.partial(ddp, prepare=checkpointed, static_graph=True),
    "ddp frozen": functools.partial(ddp, prepare=frozen, reference=frozen),
    "fsdp": fsdp,
    "fsdp layers": functools.partial(fsdp, units="layers"),
    "fsdp bf16": functools.partial(
        fsdp, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    ),
    "fsdp autocast": functools.partial(fsdp, cast=bf16),
    "fsdp offload": functools.partial(fsdp, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp meta": functools.partial(fsdp, meta=True),
    "fsdp checkpointed": functools.partial(fsdp, prepare=checkpointed),
    "fsdp frozen": functools.partial(fsdp, prepare=frozen, reference=frozen),
}


def checks():
    found = {}
    for variant, function in VARIANTS.items():
        for preset, after in setups(variant):
            name = f"{variant}/{preset}/{'after' if after else 'before'}"
            found[name] = functools.partial(function, preset, after)
    found["fsdp steps/paper/after"] = functools.partial(fsdp_steps, "paper", True)
    for after in (False, True):
        where = "after" if after else "before"
        for preset in ("lossless", "mesa8"):
            found[f"ddp no_sync/{preset}/{where}"] = functools.partial(ddp_no_sync, preset, after)
            found[f"fsdp no_sync/{preset}/{where}"] = functools.partial(fsdp_no_sync, preset, after)
        found[f"fsdp state/mesa8/{where}"] = functools.partial(fsdp_state_dicts, "mesa8", after)
    return found


if __name__ == "__main__":
    assert STEPS > 1
    start()
    run(checks(), sys.argv[1])
