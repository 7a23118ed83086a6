"""How one optimizer step runs on one process, under FSDP2 with tensor parallelism, or under ZeRO-3.

An engine owns the model, the optimizer and the processes; the loop (`sharded_loop.py`) is the same
for all. `FSDP2Backend` is plain PyTorch, sharded or not. `ZeRO3Backend` is DeepSpeed through Accelerate, which
reads offloading from the launcher's configuration.
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

# What processes talk through.
_COMMUNICATION = {"cpu": "gloo", "cuda": "nccl"}


class Backend(Protocol):
    """One run's model and optimizer. `data_rank` of `data_ranks` says which images are its own."""

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
    """The engine that configuration and launcher ask for. ConfigError where they disagree.

    checkpoint: will be loaded. CheckpointError if it, or the weights to start from, are another model's.
    """
    backend = backend_name(config, int(os.environ.get("WORLD_SIZE", "1")))
    name = precision_of(config).name
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=name))
    check_precision(config.train.precision)
    # Before any memory is given.
    if config.model.weights:
        sketch, head = build(config, classes, "meta"), config.model.fresh_head
        checkpoints.check_export(Path(config.model.weights), sketch, head)
    if checkpoint is not None:
        checkpoints.check(checkpoint, build(config, classes, "meta"))
    if backend == "zero3":
        return ZeRO3Backend(config, classes)
    return FSDP2Backend(config, classes, sharded=backend == "fsdp2")


def backend_name(config: Config, world: int) -> str:
    """ "single", "fsdp2" or "zero3", for a launch of `world` processes. ConfigError where configuration
    and launcher disagree."""
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
    """The model on `device`; on "meta" nothing is initialised."""
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
    """ConfigError for bfloat16 on a GPU that has none (before Ampere)."""
    if precision != "no" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name()
        raise ConfigError(
            f"train.precision={precision}: {name} has no bfloat16 arithmetic; set train.precision=no"
        )


class FSDP2Backend:
    """One process, or FSDP2 (times tensor parallelism) over all of them."""

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
        # FSDP gathers shards in bfloat16 itself; a whole model computes so under autocast.
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
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(images)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; they are reduced over the ranks once, at the last."""
        self.pending += 1
        if hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(self.pending == self.accumulate)
        (loss / self.accumulate).backward()

    def step(self, lr: float) -> float:
        norm = self.finish(self.model, self.config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pending = 0
        return norm.item()

    def save(self, folder: Path, state: dict[str, Any]) -> Path:
        return checkpoints.save(folder, self.model, self.optimizer, state)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        return checkpoints.load(checkpoint, self.model, self.optimizer)

    def close(self) -> None:
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


class ZeRO3Backend:
    """DeepSpeed's ZeRO-3 through Accelerate, offloading as the launcher's configuration says."""

    def __init__(self, config: Config, classes: int) -> None:
        import deepspeed
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
        from deepspeed.utils import set_z3_leaf_modules

        from mesa_train.models.vit22b.init import initialise
        from mesa_train.models.vit22b.model import ParallelBlock

        train = config.train
        # Without this, Accelerate on a CPU takes every process for the only one.
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
        # Its own mode, not torch_autocast: that keeps float32 weights beside the model.
        if train.precision == "bf16":
            settings["bf16"] = {"enabled": True}
        elif train.precision == "pure_bf16":
            settings["bf16"] = {
                "enabled": True,
                "bf16_master_weights_and_grads": True,
                "bf16_optimizer_states": True,
            }
        # Every module's parameters leave this process as soon as the module is built.
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = build(config, classes, str(self.device))
        # A stash is rebuilt from weights of its whole block: they have to be there together.
        set_z3_leaf_modules(model, list(whole))
        initialise(model, train.seed, config.model.head_bias)
        if config.model.weights:
            load_weights(config, model)
        plain = install(model, train.policy, train.checkpointing)
        self.engine, self.optimizer = self.accelerator.prepare(plain, optimizer_of(config, plain))
        self.model: Any = plain

    def forward(self, images: Tensor) -> Tensor:
        dtype = images.dtype if self.config.train.precision == "no" else torch.bfloat16
        return self.engine(images.to(dtype))

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def save(self, folder: Path, state: dict[str, Any]) -> Path:
        from .zero3_checkpoint import save

        return save(folder, self, state)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        from .zero3_checkpoint import load

        return load(checkpoint, self)

    def close(self) -> None:
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()


def load_weights(config: Config, model: Any) -> None:
    """The weights that a configuration starts from."""
    assert config.model.weights
    checkpoints.load_export(Path(config.model.weights), model, config.model.fresh_head)


def install(model: Any, policy: str, checkpointing: str = "none") -> Any:
    """mesa_train on the model, unless the policy is "plain"."""
    if policy == "plain":
        return model
    chosen = Policy.preset(policy)
    if checkpointing == "coded":
        chosen = dataclasses.replace(chosen, checkpoint_inputs=8)
    return mesa_train.wrap(model, chosen)


def optimizer_of(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with 8-bit moments, over body, head and what does not decay."""
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
    # ZeRO-3 steps what it has flattened, in which norms and biases are large enough for 8 bits.
    small = [g["name"] for g in parameters].index("no_decay")
    made.mng.index2config[small, 0] = {"optim_bits": 32}
    return made


def size_buffers(
    settings: dict[str, Any], model: nn.Module, whole: tuple[type, ...], ranks: int
) -> None:
    """Buffers between disk and memory for weights on NVMe, where DeepSpeed's configuration leaves them
    open: one holds the largest parameter's share, and there are enough for two modules that are
    gathered as a `whole`, one at work and one on its way, beside all that is in none."""
    target = settings.get("zero_optimization", {}).get("offload_param") or {}
    if target.get("device") != "nvme":
        return
    gathered = [list(m.parameters()) for m in model.modules() if isinstance(m, whole)]
    inside = {id(p) for parameters in gathered for p in parameters}
    outside = sum(id(p) not in inside for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    # The share is rounded up to what a disk reads at once.
    target.setdefault("buffer_size", -(-largest // ranks) + 2**20)
    target.setdefault("buffer_count", 2 * max(map(len, gathered)) + outside)


def check_deepspeed(settings: dict[str, Any], parameters: int, optimizer: str = "adamw") -> None:
    """ConfigError for what would go wrong silently, or after much memory was spent."""
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
    # float32 weight and two moments beside the optimizer, a bfloat16 weight beside the model.
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
