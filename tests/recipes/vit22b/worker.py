"""Run by two processes: the recipe's loop in many configurations, one after another in one launch.

Arguments: configuration file, folder. Reads FOLDER/single (a checkpoint of one process), writes
FOLDER/found.json (found4.json on four): losses by case, and what rank 0 saw of its shards.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mesa_train.training.vit22b import config as sharded_config
from mesa_train.training.vit22b import loop as sharded_loop
from mesa_train.training.vit22b.checkpoint import export

CASES = {
    "fsdp2": {"policy": "plain", "save_every": 3},
    "fsdp2 lossless": {"policy": "lossless"},
    "fsdp2 mesa8-recompute": {"policy": "mesa8-recompute"},
    "fsdp2 coded inputs": {"policy": "mesa8", "checkpointing": "coded"},
    "fsdp2 offloaded": {"policy": "plain", "offload": True},
    "fsdp2 bf16": {"policy": "mesa8", "precision": "bf16"},
    "tp": {"policy": "plain", "tensor_parallel": 2, "micro_batch": 32, "save_every": 3},
    "tp lossless": {"policy": "lossless", "tensor_parallel": 2},
    "tp mesa8": {"policy": "mesa8", "tensor_parallel": 2},
    "tokens": {"policy": "plain", "tensor_parallel": 2, "sequence_parallel": True},
    "tokens mesa8": {
        "policy": "mesa8",
        "checkpointing": "coded",
        "tensor_parallel": 2,
        "sequence_parallel": True,
    },
    "fsdp2 adamw8bit": {"policy": "mesa8", "optimizer": "adamw8bit", "save_every": 3},
    "fsdp2 adamw8bit resumes": {
        "policy": "mesa8",
        "optimizer": "adamw8bit",
        "resume": "fsdp2 adamw8bit/step-00000003",
    },
    "fsdp2 resumes fsdp2": {"policy": "plain", "resume": "fsdp2/step-00000003"},
    "fsdp2 resumes tp": {"policy": "plain", "resume": "tp/step-00000003"},
    "tp resumes tp": {"policy": "plain", "tensor_parallel": 2, "resume": "tp/step-00000003"},
    "tp resumes one process": {
        "policy": "plain",
        "tensor_parallel": 2,
        "resume": "single/step-00000003",
    },
    "fsdp2 resumes one process": {"policy": "plain", "resume": "single/step-00000003"},
    "tp resumes fsdp2": {"policy": "plain", "tensor_parallel": 2, "resume": "fsdp2/step-00000003"},
}

# On four processes: two that share the heads, two of each.
FOUR = {
    "2x2": {"policy": "plain", "tensor_parallel": 2, "micro_batch": 8, "save_every": 3},
    "2x2 mesa8": {"policy": "mesa8", "tensor_parallel": 2, "micro_batch": 16},
    "2x2 resumes tp": {
        "policy": "plain",
        "tensor_parallel": 2,
        "micro_batch": 8,
        "resume": "tp/step-00000003",
    },
}


def main(file, folder):
    found = {}
    four = int(os.environ["WORLD_SIZE"]) == 4
    for name, changes in (FOUR if four else CASES).items():
        given = [f"train.out={folder / name}"]
        for key, value in changes.items():
            section = "optim.name" if key == "optimizer" else f"train.{key}"
            given.append(f"{section}={folder / value if key == 'resume' else value}")
        config = sharded_config.load(file, given)
        rows = []
        engine = sharded_loop.train(config, rows.append)
        weight = engine.model.blocks[0].in_proj.weight
        found[name] = {
            "losses": [row["loss"] for row in rows],
            "norms": [row["norm"] for row in rows],
            "world": dist.get_world_size(),
            "global": list(weight.shape),
            "local": list(weight.to_local().shape),
            "placements": str(weight.placements),
        }
        if name == "tp":
            export(folder / "weights", engine.model)
        dist.barrier()
    engine.close()
    if int(os.environ["RANK"]) == 0:
        name = "found4.json" if four else "found.json"
        (folder / name).write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
