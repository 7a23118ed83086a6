"""Backends of the ViT-22B training: one optimizer step on one process, under FSDP2 or ZeRO-3.

A backend holds the model, the optimizer and the process group. The loop (`loop.py`) is the same for
all backends. `FSDP2Backend` is plain PyTorch, sharded (with or without tensor parallelism) or not.
`ZeRO3Backend` is DeepSpeed through Accelerate; the launcher's configuration sets its offloading.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mesa_train
from mesa_train.policy import Policy
from mesa_train.training.optim.sharded_adamw8bit import LocalShards

from . import checkpoint as checkpoints
from .config import Config, ConfigError, accumulation, precision_of
from .schedule import groups

# Communication backend of torch.distributed, by device.
_COMMUNICATION = {"cpu": "gloo", "cuda": "nccl"}


class Backend(Protocol):
    """Model and optimizer of one run.

    Attributes:
        model: the model, wrapped by mesa_train unless the policy is "plain".
        device: of this process.
        data_rank: this process's part of the images, from 0.
        data_ranks: number of parts.
        rank: of this process.
    """

    model: nn.Module
    device: torch.device
    data_rank: int
    data_ranks: int
    rank: int

    def forward(self, images: Tensor) -> Tensor: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr: float) -> float: ...

    def save(self, folder: Path, state: dict[str, Any]) -> Path: ...

    def load(self, checkpoint: Path) -> dict[str, Any]: ...

    def close(self) -> None: ...


def make_backend(config: Config, classes: int, checkpoint: Path | None = None) -> Backend:
    """Build the backend that the configuration and the launcher select.

    Args:
        config: of the run.
        classes: number of classes.
        checkpoint: the checkpoint that will be loaded; None for a new run.
    Raises:
        ConfigError: configuration and launcher do not match.
        CheckpointError: the checkpoint, or the initial weights, are of another model.
    """
    backend = backend_name(config, int(os.environ.get("WORLD_SIZE", "1")))
    name = precision_of(config).name
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=name))
    check_precision(config.train.precision)
    # Check the files before any memory is allocated.
    if config.model.weights:
        sketch, head = build(config, classes, "meta"), config.model.fresh_head
        checkpoints.check_export(Path(config.model.weights), sketch, head)
    if checkpoint is not None:
        checkpoints.check(checkpoint, build(config, classes, "meta"))
    if backend == "zero3":
        return ZeRO3Backend(config, classes)
    return FSDP2Backend(config, classes, sharded=backend == "fsdp2")


def backend_name(config: Config, world: int) -> str:
    """The backend of a launch with `world` processes: "single", "fsdp2" or "zero3".

    Raises:
        ConfigError: configuration and launcher do not match.
    """
    backend = config.train.backend
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if backend == "auto":
        backend = "zero3" if deepspeed else "fsdp2" if world > 1 else "single"
    if backend == "zero3" and not deepspeed:
        raise ConfigError(
            "train.backend=zero3 needs a DeepSpeed launch: "
            "accelerate launch --config_file recipes/vit22b/accelerate/zero3.yaml ..."
        )
    if backend == "single" and world > 1:
        raise ConfigError(f"train.backend=single, but {world} processes were started")
    if config.train.tensor_parallel > 1 and (backend != "fsdp2" or world == 1):
        raise ConfigError(
            f"train.tensor_parallel={config.train.tensor_parallel} needs the backend fsdp2 and as "
            f"many processes; this is {backend} with {world}"
        )
    return backend


def build(config: Config, classes: int, device: str) -> Any:
    """Build the model on `device`. On "meta", no weight is initialised."""
    import timm

    import mesa_train.models  # noqa: F401  registers them with timm

    model, dtype = config.model, torch.get_default_dtype()
    if config.train.precision == "pure_bf16":
        dtype = torch.bfloat16
    with torch.device(device):
        built = timm.create_model(
            model.name,
            img_size=model.image_size,
            num_classes=classes,
            qk_norm=model.qk_norm,
            gelu=model.gelu,
            pool_bias=model.pool_bias,
            drop_path_rate=model.drop_path,
            dtype=dtype,
        )
    built.set_grad_checkpointing(config.train.checkpointing != "none")
    return built.train()


def check_precision(precision: str) -> None:
    """Raise ConfigError for bfloat16 on a GPU without bfloat16 (before Ampere)."""
    if precision != "no" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name()
        raise ConfigError(
            f"train.precision={precision}: {name} has no bfloat16 arithmetic; set train.precision=no"
        )


class FSDP2Backend:
    """One process, or FSDP2 (with or without tensor parallelism) over all processes.

    Args:
        config: of the run.
        classes: number of classes.
        sharded: use FSDP2.
    """

    def __init__(self, config: Config, classes: int, sharded: bool) -> None:
        from mesa_train.models.vit22b import init as vit22b_init
        from mesa_train.models.vit22b import parallel as vit22b_parallel
        from mesa_train.models.vit22b import sequence_parallel as vit22b_tokens

        train = config.train
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        place = f"{kind}:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else kind
        self.device = torch.device(place)
        self.config, self.rank, self.data_rank, self.data_ranks = config, 0, 0, 1
        self.finish = vit22b_parallel.finish_gradients
        # FSDP casts gathered weights to bfloat16 itself. A model on one process uses autocast.
        half = train.precision == "bf16"
        self.autocast = half and not sharded
        model = build(config, classes, "meta")
        if sharded:
            if kind == "cuda":
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():
                dist.init_process_group(_COMMUNICATION[kind])
            mesh = vit22b_parallel.mesh_of(kind, dist.get_world_size(), train.tensor_parallel)
            accumulation(train, mesh["dp"].size())
            if train.async_tensor_parallel:
                vit22b_tokens.check_overlap(mesh["tp"])
            vit22b_parallel.sharded(
                model,
                mesh,
                device=str(self.device),
                seed=train.seed,
                head_bias=config.model.head_bias,
                sequence=train.sequence_parallel,
                compute=torch.bfloat16 if half else None,
                reshard=train.reshard,
                offload=train.offload,
            )
            self.rank = dist.get_rank()
            self.data_rank, self.data_ranks = mesh["dp"].get_local_rank(), mesh["dp"].size()
        else:
            accumulation(train, 1)
            model.to_empty(device=self.device)
            vit22b_init.initialise(model, train.seed, config.model.head_bias)
        self.accumulate = accumulation(train, self.data_ranks)
        if config.model.weights:
            load_weights(config, model)
        self.model: Any = install(model, train.policy, train.checkpointing)
        if sharded and train.async_tensor_parallel:
            vit22b_tokens.overlapped(self.model, mesh["tp"])
        self.optimizer = optimizer_of(config, self.model)
        self.pending = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a micro-batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(images)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients. The last micro-batch reduces them over the ranks."""
        self.pending += 1
        if hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(self.pending == self.accumulate)
        (loss / self.accumulate).backward()

    def step(self, lr: float) -> float:
        """Clip the gradients and take an optimizer step. Returns the norm before clipping."""
        norm = self.finish(self.model, self.config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending = 0
        return norm.item()

    def save(self, folder: Path, state: dict[str, Any]) -> Path:
        """Write a checkpoint from all ranks."""
        return checkpoints.save(folder, self.model, self.optimizer, state)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Read a checkpoint. Returns its state."""
        return checkpoints.load(checkpoint, self.model, self.optimizer)

    def close(self) -> None:
        """End the process group."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


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
        from mesa_train.models.vit22b.model import ParallelBlock

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


def load_weights(config: Config, model: Any) -> None:
    """Load the initial weights of a configuration."""
    assert config.model.weights
    checkpoints.load_export(Path(config.model.weights), model, config.model.fresh_head)


def install(model: Any, policy: str, checkpointing: str = "none") -> Any:
    """Wrap the model by mesa_train, unless the policy is "plain"."""
    if policy == "plain":
        return model
    chosen = Policy.preset(policy)
    if checkpointing == "coded":
        chosen = dataclasses.replace(chosen, checkpoint_inputs=8)
    return mesa_train.wrap(model, chosen)


def optimizer_of(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW, or bitsandbytes' AdamW with 8-bit moments, over the parameter groups.

    Raises:
        ConfigError: bitsandbytes is needed and missing.
    """
    optim = config.optim
    parameters = groups(model, optim.weight_decay, optim.head_decay)
    if optim.name == "adamw":
        return torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas)
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError(
            f"optim.name={optim.name} needs: pip install 'mesa_train[bitsandbytes]'"
        ) from None

    def make(given: list[dict[str, Any]]) -> Any:
        return bitsandbytes.optim.AdamW8bit(given, lr=optim.lr, betas=optim.betas)

    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return LocalShards(parameters, make)
    made = make(parameters)
    # ZeRO-3 flattens the parameters before a step. The flat tensor of norms and biases is so large
    # that bitsandbytes would use 8 bits; 32 bits are set for it here.
    small = [g["name"] for g in parameters].index("no_decay")
    made.mng.index2config[small, 0] = {"optim_bits": 32}
    return made


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
        optimizer: "adamw" or "adamw8bit".
    Raises:
        ConfigError: names the setting and the remedy.
    """
    import shutil

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
