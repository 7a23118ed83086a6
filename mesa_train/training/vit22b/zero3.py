"""The ZeRO-3 backend: one optimizer step on one process under DeepSpeed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .backend import average_of, build, install, load_weights, optimizer_of
from .config import Config, ConfigError, accumulation


class ZeRO3Backend:
    """DeepSpeed's ZeRO-3 through Accelerate.

    The launcher's configuration sets the offloading.

    Args:
        config: of the run.
        classes: number of classes.
    """

    def __init__(self, config: Config, classes: int) -> None:
        import deepspeed
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
        from deepspeed.utils import set_z3_leaf_modules

        from mesa_train.models.vit22b.init import initialise
        from mesa_train.models.vit22b.layers import ParallelBlock

        train = config.train
        # Without this handler, Accelerate on a CPU starts every process as the only one.
        handlers = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
        self.accelerator = Accelerator(kwargs_handlers=handlers)
        world = int(os.environ["WORLD_SIZE"])
        if self.accelerator.num_processes != world:
            raise ConfigError(
                f"Accelerate sees {self.accelerator.num_processes} processes of {world}; "
                "training would not be synchronised"
            )
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        sketch = build(config, classes, "meta")
        count = sum(p.numel() for p in sketch.parameters())
        whole = (ParallelBlock, type(sketch.attn_pool))
        for key in ("offload_param", "offload_optimizer"):
            target = settings.get("zero_optimization", {}).get(key) or {}
            if train.nvme_path and target.get("device") == "nvme":
                target["nvme_path"] = train.nvme_path
        size_buffers(settings, sketch, whole, world)
        check_deepspeed(settings, count, config.optim.name)
        self.config, self.device = config, self.accelerator.device
        self.rank = self.data_rank = self.accelerator.process_index
        self.data_ranks = world
        self.accumulate = accumulation(train, world)
        settings["train_micro_batch_size_per_gpu"] = train.micro_batch
        settings["gradient_accumulation_steps"] = self.accumulate
        settings["train_batch_size"] = train.global_batch
        settings["gradient_clipping"] = config.optim.clip
        # DeepSpeed's bf16 mode, not torch_autocast, which keeps float32 weights beside the model.
        if train.precision == "bf16":
            settings["bf16"] = {"enabled": True}
        elif train.precision == "pure_bf16":
            settings["bf16"] = {
                "enabled": True,
                "bf16_master_weights_and_grads": True,
                "bf16_optimizer_states": True,
            }
        # ZeRO-3 partitions the parameters of each module as soon as the module is built.
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = build(config, classes, str(self.device))
        # A stash is rebuilt from the weights of its whole block, so ZeRO-3 must gather them
        # together.
        set_z3_leaf_modules(model, list(whole))
        initialise(model, train.seed, config.model.head_bias)
        if config.model.weights:
            load_weights(config, model)
        plain = install(model, train.policy, train.checkpointing)
        self.engine, self.optimizer = self.accelerator.prepare(plain, optimizer_of(config, plain))
        self.model: Any = plain
        self.average = average_of(config, plain)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a micro-batch."""
        dtype = images.dtype if self.config.train.precision == "no" else torch.bfloat16
        return self.engine(images.to(dtype))

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, lr: float) -> float:
        """Take an optimizer step. Returns the gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def save(self, folder: Path, state: dict[str, Any]) -> Path:
        """Write a checkpoint from all ranks."""
        from .zero3_checkpoint import save

        return save(folder, self, state)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Read a checkpoint. Returns its state."""
        from .zero3_checkpoint import load

        return load(checkpoint, self)

    def close(self) -> None:
        """Wait for all ranks and end the process group."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()


def size_buffers(
    settings: dict[str, Any], model: nn.Module, whole: tuple[type, ...], ranks: int
) -> None:
    """Set size and number of the NVMe buffers for weights.

    Values in DeepSpeed's configuration take precedence.

    One buffer holds this rank's share of the largest parameter. The number covers two modules that
    are gathered whole (one computes, the next one is prefetched), and all parameters outside such
    modules.

    Args:
        settings: DeepSpeed's configuration, changed in place.
        model: on the meta device.
        whole: classes of modules that are gathered whole.
        ranks: number of processes.
    """
    target = settings.get("zero_optimization", {}).get("offload_param") or {}
    if target.get("device") != "nvme":
        return
    gathered = [list(m.parameters()) for m in model.modules() if isinstance(m, whole)]
    inside = {id(p) for parameters in gathered for p in parameters}
    outside = sum(id(p) not in inside for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    # The share is rounded up to the size of a disk read.
    target.setdefault("buffer_size", -(-largest // ranks) + 2**20)
    target.setdefault("buffer_count", 2 * max(map(len, gathered)) + outside)


def check_deepspeed(settings: dict[str, Any], parameters: int, optimizer: str = "adamw") -> None:
    """Check DeepSpeed's configuration for silent or late faults.

    A late fault appears only after much memory is used.

    Args:
        settings: DeepSpeed's configuration.
        parameters: number of parameters of the model.
        optimizer: "adamw", "adamw8bit" or "sgd", which is refused.
    Raises:
        ConfigError: names the setting and the remedy.
    """
    import shutil

    if optimizer == "sgd":
        raise ConfigError(
            "optim.name=sgd does not run under ZeRO-3, whose checkpoints convert AdamW's moments "
            "alone; take train.backend=fsdp2, or optim.name=adamw"
        )
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise ConfigError(f"zero_optimization.stage must be 3, got {zero.get('stage')!r}")
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    if optimizer == "adamw8bit" and device != "none":
        raise ConfigError(
            f"optim.name=adamw8bit steps on the card, but zero_optimization.offload_optimizer.device "
            f"is {device}; take optim.name=adamw"
        )
    # The optimizer holds a float32 weight and two moments; the model holds a bfloat16 weight.
    for key, bytes_each in (("offload_param", 2), ("offload_optimizer", 12)):
        target = zero.get(key) or {}
        if target.get("device") != "nvme":
            continue
        from deepspeed.ops.op_builder import AsyncIOBuilder

        folder = Path(str(target.get("nvme_path")))
        if not folder.is_dir():
            raise ConfigError(
                f"zero_optimization.{key}.nvme_path: no such folder {folder}; set train.nvme_path"
            )
        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError("offloading to NVMe needs libaio: apt-get install libaio-dev")
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"zero_optimization.{key}.nvme_path: {folder} cannot be written to")
        need, free = parameters * bytes_each, shutil.disk_usage(folder).free
        if free < need:
            raise ConfigError(
                f"zero_optimization.{key}.nvme_path: {folder} has {free / 2**30:.1f} GiB free, "
                f"{need / 2**30:.1f} are needed"
            )
