"""Worker: Accelerate on two CPU processes, plain DDP or a DeepSpeed plugin, without mesa_train and with
it: wrapped before `prepare`, after it, and by `enable`."""

import functools
import os
import sys
import tempfile
from datetime import timedelta

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from integration_models import POLICIES, Net, batch, distance
from torch.utils.data import DataLoader, TensorDataset
from worker_tools import alone, criterion, moved, run, share, train, wrapped

from mesa_train.engine.wrap import policy_of
from mesa_train.integrations.accelerate import enable

GLOO = [InitProcessGroupKwargs(backend="gloo")]


def accelerator_for(kind, accumulation=1):
    AcceleratorState._reset_state()
    GradientState._reset_state()
    keywords = {"kwargs_handlers": GLOO, "gradient_accumulation_steps": accumulation}
    if kind == "ddp":
        made = Accelerator(cpu=True, **keywords)
    elif kind == "fsdp2":
        # Accelerate takes FSDP for a thing of accelerators alone.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_offload=False,
        )
        made = Accelerator(fsdp_plugin=plugin, **keywords)
        assert made.distributed_type is DistributedType.FSDP
    else:
        zero = {
            "stage": int(kind[-1]),
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        settings = {
            "train_micro_batch_size_per_gpu": 2 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
        }
        made = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings), **keywords)
    assert made.num_processes == 2
    return made


def prepared(kind, how, preset, accumulation=1):
    accelerator = accelerator_for(kind, accumulation)
    model = Net(drop=0.0)
    if how == "before":
        wrapped(model, preset)
    if how == "enable":
        enable(accelerator, POLICIES[preset])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    if how == "after":
        model = wrapped(model, preset)
    return accelerator, model, optimizer


def training(kind, how, preset):
    accelerator, model, optimizer = prepared(kind, how, preset)

    def advance():
        optimizer.step()
        optimizer.zero_grad()

    losses, kept = train(model, accelerator.backward, advance)
    expected, weights = alone()
    state = accelerator.get_state_dict(model)
    away = 0.0
    state = {n: getattr(v, "full_tensor", lambda v=v: v)() for n, v in (state or {}).items()}
    if accelerator.is_main_process:
        away = moved(state, weights)
    held = [away]
    dist.broadcast_object_list(held)
    return {
        "losses": losses,
        "alone": expected,
        "kept": kept,
        "offloaded": held[0],
        "unwrapped": policy_of(accelerator.unwrap_model(model)) == (preset and POLICIES[preset]),
    }


def accumulation(kind, how, preset):
    """`with accelerator.accumulate(model)` over two halves, against the whole batch."""
    updates = []
    for pieces in (1, 2):
        accelerator, model, optimizer = prepared(kind, how, preset, pieces)
        loader = DataLoader(TensorDataset(share(batch())), batch_size=2 // pieces)
        for (part,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(criterion(model(part)))
                optimizer.step()
                optimizer.zero_grad()
        plain = accelerator.unwrap_model(model)
        start = Net(drop=0.0).state_dict()
        updates.append(torch.cat([(v - start[n]).flatten() for n, v in plain.state_dict().items()]))
    return {"distance": distance(updates[1], updates[0]), "offloaded": bool(updates[0].norm() > 0)}


def saved(kind, how, preset):
    """`save_state` with mesa_train, `load_state` without it."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    accelerator, model, optimizer = prepared(kind, how, preset)
    accelerator.backward(criterion(model(share(batch()))))
    optimizer.step()
    accelerator.save_state(folder[0])
    expected = accelerator.unwrap_model(model).state_dict()
    other, plain, _ = prepared(kind, "before", None)
    other.load_state(folder[0])
    found = other.unwrap_model(plain).state_dict()
    return {"same": all(torch.equal(v, expected[n]) for n, v in found.items())}


def checks():
    found = {}
    for kind in ("ddp", "zero2", "zero3", "fsdp2"):
        found[f"{kind}/None/before"] = functools.partial(training, kind, "before", None)
        for how in ("before", "after", "enable"):
            for preset in ("lossless", "mesa8"):
                found[f"{kind}/{preset}/{how}"] = functools.partial(training, kind, how, preset)
            if kind in ("ddp", "zero2"):
                found[f"{kind} accumulate/mesa8/{how}"] = functools.partial(
                    accumulation, kind, how, "mesa8"
                )
        if kind == "ddp":
            found["ddp state/mesa8/enable"] = functools.partial(saved, kind, "enable", "mesa8")
    return found


if __name__ == "__main__":
    PartialState(cpu=True, backend="gloo", timeout=timedelta(hours=1))
    run(checks(), sys.argv[1])
