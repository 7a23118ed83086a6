"""Checkpoints of DeepSpeed's ZeRO-3 in DeepSpeed's format, readable by any number of processes.

Each rank writes its shards of weights and moments. The same number of ranks reads the shards
directly. Another number needs DeepSpeed's universal format: rank 0 converts the checkpoint once,
into a subfolder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mesa_train.training import disk
from mesa_train.training.disk import CheckpointError

from .checkpoint import gather, state_of, written

_TAG, _UNIVERSAL = "zero", "universal"


def save(folder: Path, run: Any, state: dict[str, Any]) -> Path:
    """Write `folder/step-N` from all ranks and return it. Errors as for `checkpoint.save`."""

    def note() -> dict[str, Any]:
        shapes = {n: list(p.ds_shape) for n, p in run.model.named_parameters()}
        return {"ranks": run.data_ranks, "shapes": shapes}

    def shards(partial: Path) -> None:
        with disk.to_the_end(run.engine):
            run.engine.save_checkpoint(str(partial), tag=_TAG)

    average = run.average
    return written(folder, state, shards, note, None if average is None else average.save)


def load(checkpoint: Path, run: Any) -> dict[str, Any]:
    """Read a checkpoint of any number of ranks.

    Returns:
        The state of the checkpoint.
    Raises:
        CheckpointError: before any read, if the checkpoint is incomplete or of another model.
    """
    state = state_of(checkpoint)
    found = state.pop("shapes", {})
    wanted = {n: list(p.ds_shape) for n, p in run.model.named_parameters()}
    if found != wanted:
        other = [n for n in {**wanted, **found} if found.get(n) != wanted.get(n)]
        example = f"{other[0]} is {found.get(other[0])}, not {wanted.get(other[0])}"
        raise CheckpointError(
            f"{checkpoint} is of another model: {len(other)} parameters differ; {example}"
        )
    with disk.reading(checkpoint):
        ranks = state.pop("ranks")
    universal = ranks != run.data_ranks
    if universal and run.config.optim.name == "adamw8bit":
        raise CheckpointError(
            f"{checkpoint} holds 8-bit moments of {ranks} ranks, which as many can read; this is "
            f"{run.data_ranks}"
        )
    tag = _TAG
    if universal:
        tag = _UNIVERSAL
        disk.read_together(
            lambda: _convert(checkpoint) if run.rank == 0 else None, checkpoint, gather
        )
    before = run.engine._config.load_universal_checkpoint
    run.engine._config.load_universal_checkpoint = universal
    # From the universal format, DeepSpeed gives every group the decay of the first group. It also
    # gives all states one shared step counter, which each state would then advance.
    owned = [
        {k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups
    ]
    try:
        _load(run.engine, checkpoint, tag)
    finally:
        run.engine._config.load_universal_checkpoint = before
    for group, own in zip(run.optimizer.param_groups, owned, strict=True):
        group.update(own)
    for moments in run.engine.optimizer.optimizer.state.values():
        if torch.is_tensor(moments.get("step")):
            moments["step"] = moments["step"].clone()
    return state


def _load(engine: Any, checkpoint: Path, tag: str) -> None:
    """Read this rank's shards. If one rank fails, all ranks raise.

    DeepSpeed's load ends with its one collective, which gathers small parameters. A rank that
    cannot read would never reach it. The collective therefore runs after all ranks have read.
    """
    optimizer, epilogue = engine.optimizer, engine.optimizer.checkpoint_event_epilogue

    def read() -> None:
        if engine.load_checkpoint(str(checkpoint), tag=tag)[0] is None:
            raise CheckpointError(f"{checkpoint}: DeepSpeed found nothing to read in it")

    optimizer.checkpoint_event_epilogue = lambda: None
    try:
        disk.read_together(read, checkpoint, gather)
    finally:
        del optimizer.checkpoint_event_epilogue
    epilogue()


def _convert(checkpoint: Path) -> None:
    """Run DeepSpeed's conversion in a separate process, because it starts workers."""
    target = checkpoint / _UNIVERSAL
    if target.is_dir():
        return
    partial = checkpoint / f".partial-{_UNIVERSAL}"
    shutil.rmtree(partial, ignore_errors=True)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"),
            *("--input_folder", str(checkpoint / _TAG), "--output_folder", str(partial)),
            *("--num_extract_workers", "1", "--num_merge_workers", "1"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["DeepSpeed gave no reason"]
        disk.remove(partial)
        raise CheckpointError(f"{checkpoint} could not be converted: {said[-1][-500:]}")
    partial.rename(target)
