"""How to start what was estimated: accelerate's configuration file and the command."""

from __future__ import annotations

from typing import Any

from mesa_train.memory.estimate import Estimate
from mesa_train.memory.sharding import Cluster


def accelerate_config(found: Estimate, cluster: Cluster) -> str:
    """The YAML file for `accelerate launch --config_file`."""
    import yaml

    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO" if cluster.gpus == 1 and found.strategy == "ddp" else "MULTI_GPU",
        "mixed_precision": "bf16",
        "num_machines": cluster.nodes,
        "machine_rank": 0,
        "num_processes": cluster.gpus,
        "main_training_function": "main",
    }
    if found.strategy.startswith("zero"):
        config["distributed_type"] = "DEEPSPEED"
        stage = int(found.strategy[-1])
        deepspeed: dict[str, Any] = {
            "zero_stage": stage,
            "gradient_accumulation_steps": 1,
            "offload_optimizer_device": found.offload,
            "offload_param_device": found.offload if stage == 3 else "none",
        }
        if stage == 3:
            deepspeed |= {"zero3_init_flag": True, "zero3_save_16bit_model": True}
        config["deepspeed_config"] = deepspeed
    elif found.strategy == "fsdp2":
        config["distributed_type"] = "FSDP"
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": found.offload == "cpu",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_activation_checkpointing": found.policy == "checkpoint",
        }
        if cluster.tensor_parallel > 1:
            config["parallelism_config"] = {
                "parallelism_config_tp_size": cluster.tensor_parallel,
                "parallelism_config_dp_shard_size": cluster.gpus // cluster.tensor_parallel,
            }
    return yaml.safe_dump(config, sort_keys=False)


def command(found: Estimate, model: str, path: str) -> str:
    """The command that trains with it."""
    policy = "plain" if found.policy == "checkpoint" else found.policy
    more = " model.grad_checkpointing=true" if found.policy == "checkpoint" else ""
    return (
        f"accelerate launch --config_file {path} train.py model.name={model} "
        f"train.micro_batch={found.batch} train.policy={policy} "
        f"optim.name={found.optimizer}{more}"
    )
