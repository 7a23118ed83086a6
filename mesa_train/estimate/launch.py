"""Write the configuration file of accelerate and the command that starts an estimated training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mesa_train.methods.apply import CHECKPOINT
from mesa_train.policy import OFFLOADED

from .estimator import Estimate
from .model_states import Cluster

# Trains any timm model, not only the model of its name.
_RECIPE = "recipes/litv2"
# Trains ViT-22B and its smaller versions, sharded with tensor parallelism, or on one card.
_VIT22B = "recipes/vit22b"
_OFFLOAD = {"optimizer": "cpu"}


def accelerate_config(estimate: Estimate, cluster: Cluster, blocks: Sequence[str] = ()) -> str:
    """Make the YAML text for `accelerate launch --config_file`.

    Args:
        found: the way to train.
        cluster: the GPUs and machines.
        blocks: class names of the modules that FSDP shards one by one; if empty, FSDP shards by
            size.
    """
    import yaml

    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "bf16",
        "num_machines": cluster.nodes,
        "machine_rank": 0,
        "num_processes": cluster.gpus,
        "use_cpu": False,
    }
    if cluster.nodes > 1:
        # The file of each machine needs its own machine_rank.
        config |= {"main_process_ip": "ADDRESS_OF_MACHINE_0", "main_process_port": 29500}
    if cluster.gpus == 1 and estimate.strategy in ("ddp", "in_backward"):
        config["distributed_type"] = "NO"
    if estimate.strategy.startswith("zero"):
        config["distributed_type"] = "DEEPSPEED"
        stage = int(estimate.strategy[-1])
        deepspeed: dict[str, Any] = {
            "zero_stage": stage,
            "gradient_accumulation_steps": 1,
            "offload_optimizer_device": _OFFLOAD.get(estimate.offload, estimate.offload),
            "offload_param_device": (
                estimate.offload if stage == 3 and estimate.offload != "optimizer" else "none"
            ),
        }
        if estimate.offload == "nvme":
            paths = ("offload_optimizer_nvme_path", "offload_param_nvme_path")
            deepspeed |= dict.fromkeys(paths, "/FOLDER/ON/NVME")
        if stage == 3:
            deepspeed |= {"zero3_init_flag": True, "zero3_save_16bit_model": True}
        config["deepspeed_config"] = deepspeed
    elif estimate.strategy == "fsdp2":
        config["distributed_type"] = "FSDP"
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP" if blocks else "SIZE_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": estimate.offload == "cpu",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_activation_checkpointing": estimate.policy == "checkpoint",
        }
        if blocks:
            config["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] = ",".join(blocks)
        else:
            config["fsdp_config"]["fsdp_min_num_params"] = 1_000_000
        if cluster.tensor_parallel > 1:
            config["parallelism_config"] = {
                "parallelism_config_tp_size": cluster.tensor_parallel,
                "parallelism_config_dp_shard_size": cluster.gpus // cluster.tensor_parallel,
            }
    return yaml.safe_dump(config, sort_keys=False)


def command(
    estimate: Estimate, model: str, path: str, gpus: int, image_size: int | None = None
) -> str:
    """Make the command that starts the training.

    It runs a recipe for timm's models, and a script that the user fills in for other models.

    Args:
        found: the way to train.
        model: the MODEL string.
        path: path of accelerate's configuration.
        gpus: number of GPUs.
        image_size: height and width of the images; None for the recipe's default.
    """
    start = f"accelerate launch --config_file {path}"
    scheme, colon, rest = model.partition(":")
    if colon and scheme != "timm":
        return f"{start} YOUR_TRAINING_SCRIPT.py"
    name = rest if colon else model
    if name.startswith("vit_22b"):
        return _vit22b(estimate, name, start, gpus)
    if (
        estimate.strategy == "in_backward"
        or estimate.lora
        or estimate.half
        or "+coded" in estimate.policy
    ):
        return f"{start} YOUR_TRAINING_SCRIPT.py"  # The recipe for timm models has none of these.
    preset, checkpointed = _parts(estimate.policy)
    settings = {
        "model.name": name,
        "train.micro_batch": estimate.batch,
        "train.global_batch": estimate.batch * gpus,
        "train.policy": preset,
        "optim.name": estimate.optimizer,
    }
    if image_size is not None:
        settings["data.image_size"] = image_size
    if checkpointed:
        settings["model.grad_checkpointing"] = "true"
    return f"{start} {_RECIPE}/train.py --config {_RECIPE}/litv2_s_imagenet.yaml {_set(settings)}"


def _vit22b(estimate: Estimate, model: str, start: str, gpus: int) -> str:
    """The command of the ViT-22B recipes."""
    preset, checkpointed = _parts(estimate.policy)
    checkpointing = (
        "coded" if estimate.policy.endswith("+coded") else "block" if checkpointed else "none"
    )
    if estimate.strategy == "in_backward" or estimate.lora:
        method = "nf4" if estimate.lora else estimate.optimizer
        options = f"--model {model} --batch-size {estimate.batch} --policy {preset}"
        return f"python {_VIT22B}/onecard.py {method} {options} --checkpointing {checkpointing}"
    settings = {
        "model.name": model,
        "train.micro_batch": estimate.batch,
        "train.global_batch": estimate.batch * gpus,
        "train.policy": preset,
        "train.checkpointing": checkpointing,
        "train.precision": "pure_bf16" if estimate.half else "bf16",
        "optim.name": estimate.optimizer,
    }
    return f"{start} {_VIT22B}/train.py {_VIT22B}/large.yaml {_set(settings)}"


def _parts(policy: str) -> tuple[str, bool]:
    """(name of the preset or "plain", whether blocks are checkpointed)."""
    if policy in OFFLOADED:
        return policy, False
    preset, plus, _ = policy.partition("+")
    return ("plain", True) if preset == CHECKPOINT else (preset, bool(plus))


def _set(settings: dict[str, Any]) -> str:
    """Settings as options of the command line."""
    return " ".join(f"--set {key}={value}" for key, value in settings.items())
