"""Worker: DeepSpeed ZeRO 1, 2, 3 and offload on its CPU accelerator, without mesa_train and with it,
wrapped before and after `deepspeed.initialize`."""

import contextlib
import functools
import os
import sys
import tempfile

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from integration_models import Net, batch, distance
from worker_tools import (
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
    wrapped,
)

import mesa_train


def identity(model):
    return model


def config(stage, offload=False, autocast=False, accumulation=1, efficient_linear=True):
    rows = 4 // dist.get_world_size()
    settings = {
        "train_micro_batch_size_per_gpu": rows // accumulation,
        "gradient_accumulation_steps": accumulation,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "memory_breakdown": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 100000,
            "allgather_bucket_size": 100000,
        },
    }
    zero = settings["zero_optimization"]
    if stage == 3:
        # The default keeps parameters as small as these on every rank.
        zero["stage3_param_persistence_threshold"] = 0
        zero["stage3_prefetch_bucket_size"] = 5000
        zero["memory_efficient_linear"] = efficient_linear
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    if autocast:
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return settings


def made(preset, after, settings, prepare=identity, init=False):
    """A DeepSpeed engine around a net, wrapped before or after."""
    context = (
        deepspeed.zero.Init(config_dict_or_path=settings) if init else contextlib.nullcontext()
    )
    with context:
        model = Net(drop=0.0)
    if init:
        fill(model)
    model = prepare(model)
    if not after:
        wrapped(model, preset)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        config=settings,
    )
    if after:
        engine = wrapped(engine, preset)
    return engine


def fill(model):
    """Partitioned parameters get the values of the net that every check starts from."""
    for (_, p), (_, q) in zip(
        model.named_parameters(), Net(drop=0.0).named_parameters(), strict=True
    ):
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            if dist.get_rank() == 0:
                p.data.copy_(q.data)


def state(engine):
    """The whole weights."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return {n: v.detach().clone() for n, v in engine.module.state_dict().items()}


def zero(preset, after, *, prepare=identity, reference=identity, init=False, **settings):
    engine = made(preset, after, config(**settings), prepare, init)
    sharded = (
        all(p.numel() == 0 for p in engine.module.parameters()) if settings["stage"] == 3 else None
    )
    autocast = (
        functools.partial(torch.autocast, "cpu", torch.bfloat16)
        if settings.get("autocast")
        else contextlib.nullcontext
    )
    losses, kept = train(engine, engine.backward, engine.step)
    expected, weights = alone(prepare=reference, cast=autocast)
    found = {
        "losses": losses,
        "alone": expected,
        "kept": kept,
        "offloaded": moved(state(engine), weights),
        "sharded": sharded,
        "steps": steps_seen(engine if after else engine.module),
    }
    engine.destroy()
    return found


def accumulate(preset, after, stage):
    """DeepSpeed's own accumulation, against the whole batch at once."""
    gradients = []
    for pieces in (1, 2):
        engine = made(preset, after, config(stage, accumulation=pieces))
        before = state(engine)
        for part in share(batch()).chunk(pieces):
            engine.backward(criterion(engine(part)))
            engine.step()
        now = state(engine)
        gradients.append(torch.cat([(now[n] - before[n]).flatten() for n in now]))
        engine.destroy()
    return {"distance": distance(gradients[1], gradients[0])}


def checkpoints(preset, after, stage):
    """Saved with mesa_train, loaded without it, and the other way round."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    (folder,) = folder
    ours = made(preset, after, config(stage))
    ours.backward(criterion(ours(share(batch()))))
    ours.step()
    ours.save_checkpoint(folder, tag="ours")
    expected = state(ours)
    plain = made(None, False, config(stage))
    plain.load_checkpoint(folder, tag="ours")
    same = all(torch.equal(v, expected[n]) for n, v in state(plain).items())
    single = Net(drop=0.0)
    single.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag="ours"))
    same = same and all(torch.equal(v, expected[n]) for n, v in single.state_dict().items())
    plain.backward(criterion(plain(share(batch(seed=2)))))
    plain.step()
    plain.save_checkpoint(folder, tag="plain")
    ours.load_checkpoint(folder, tag="plain")
    back = all(torch.equal(v, state(plain)[n]) for n, v in state(ours).items())
    for engine in (ours, plain):
        engine.destroy()
    return {"same": same, "back": back}


def activation_checkpointing(preset, after):
    """DeepSpeed's own checkpoint function around each block."""
    deepspeed.checkpointing.configure(None, partition_activations=False)
    losses = {}
    for route in ("none", "deepspeed"):
        around = None
        if route == "deepspeed":

            def around(block, x):
                return deepspeed.checkpointing.checkpoint(block, x)

        def prepare(model, around=around):
            model.around = around
            return model

        losses[route] = zero(preset, after, stage=1, prepare=prepare)
    return {
        "losses": losses["deepspeed"]["losses"],
        "unchecked": losses["none"]["losses"],
        "offloaded": losses["deepspeed"]["offloaded"],
    }


def functional(preset, after):
    """Outside an interception ZeRO-3's own Linear is what runs; inside, ours."""
    nodes = []
    weight = torch.nn.Parameter(torch.randn(4, 4))
    x = torch.randn(2, 4, requires_grad=True)
    with mesa_train.compress("mesa8"):
        nodes.append(type(torch.nn.functional.linear(x, weight).grad_fn).__name__)
    nodes.append(type(torch.nn.functional.linear(x, weight).grad_fn).__name__)
    return {"nodes": nodes}


VARIANTS = {
    "zero1": functools.partial(zero, stage=1),
    "zero2": functools.partial(zero, stage=2),
    "zero3": functools.partial(zero, stage=3),
    "zero3 init": functools.partial(zero, stage=3, init=True),
    "zero3 frozen": functools.partial(zero, stage=3, prepare=frozen, reference=frozen),
    "zero3 autocast": functools.partial(zero, stage=3, autocast=True),
    "zero2 offload": functools.partial(zero, stage=2, offload=True),
    "zero3 offload": functools.partial(zero, stage=3, offload=True),
    "zero3 plain linear": functools.partial(zero, stage=3, efficient_linear=False),
}


def checks():
    found = {}
    for variant, function in VARIANTS.items():
        for preset, after in setups(variant):
            name = f"{variant}/{preset}/{'after' if after else 'before'}"
            found[name] = functools.partial(function, preset, after)
        if variant == "zero3":
            found["zero3 linear/mesa8/before"] = functools.partial(functional, "mesa8", False)
    for after in (False, True):
        where = "after" if after else "before"
        for stage in (2, 3):
            for preset in ("lossless", "mesa8"):
                found[f"zero{stage} accumulation/{preset}/{where}"] = functools.partial(
                    accumulate, preset, after, stage
                )
            found[f"zero{stage} checkpoints/mesa8/{where}"] = functools.partial(
                checkpoints, "mesa8", after, stage
            )
        for preset in ("lossless", "mesa8"):
            found[f"activation checkpointing/{preset}/{where}"] = functools.partial(
                activation_checkpointing, preset, after
            )
    return found


if __name__ == "__main__":
    start()
    deepspeed.init_distributed("gloo", verbose=False)
    run(checks(), sys.argv[1])
