"""Checkpoints of sharded models: every rank writes its shards, and any number of ranks reads them.

`save` and `load` use torch.distributed.checkpoint and a state file, in a folder `step-00000120`.
The folder is written under another name and then renamed, so it is complete or absent.

`export` writes plain safetensors, one file for each block, in Hugging Face's layout. It gathers one
parameter at a time, so no rank holds more than one block. `load_export` reads from such files only
the parts that a rank's shards need.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor

from mesa_train.models.vit22b.model import resampled
from mesa_train.training import disk
from mesa_train.training.checkpoints import check_keys
from mesa_train.training.disk import CheckpointError as CheckpointError

STATE, INDEX = "state.json", "model.safetensors.index.json"
# Writes files into a folder, from all ranks.
Further = Callable[[Path], Any]


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    further: Further | None = None,
) -> Path:
    """Write `folder/step-N` from all ranks; N is state["step"].

    Args:
        folder: of the checkpoints.
        model: sharded or not.
        optimizer: its optimizer.
        state: contents of the state file.
        further: writes more files of the checkpoint, from all ranks; default: none.
    Returns:
        The folder of the checkpoint.
    Raises:
        CheckpointError: on all ranks if one rank fails; names the last complete checkpoint.
    """

    def shards(partial: Path) -> None:
        weights, moments = get_state_dict(model, optimizer)
        with _alone():
            save_shards({"model": weights, "optimizer": moments}, checkpoint_id=partial)

    return written(folder, dict(state), shards, further=further)


def written(
    folder: Path,
    state: Mapping[str, Any],
    shards: Further,
    note: Any = dict,
    further: Further | None = None,
) -> Path:
    """Write `folder/step-N` under a partial name and rename it at the end.

    Args:
        folder: of the checkpoints.
        state: contents of the state file.
        shards: writes this rank's shards into the given folder.
        note: gives further entries of the state file, after the shards are written.
        further: writes more files into the given folder, from all ranks together; default: none.
    Returns:
        The folder of the checkpoint.
    Raises:
        CheckpointError: on all ranks if one rank fails.
    """
    final = folder / f"step-{state['step']:08d}"
    partial = folder / f".partial-{final.name}"

    def begin() -> None:
        if _rank() == 0:
            disk.remove(partial)
            partial.mkdir(parents=True)

    def end() -> None:
        if _rank() == 0:
            (partial / STATE).write_text(json.dumps({**state, **note()}))
            disk.remove(final)
            partial.rename(final)

    # Each step waits for all ranks.
    for step in (begin, lambda: shards(partial)):
        disk.together(step, final, partial, gather)
    if further is not None:
        further(partial)
    disk.together(end, final, partial, gather)
    return final


def load(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Read a checkpoint into a model and its optimizer, with any sharding.

    Returns:
        The state of the checkpoint.
    Raises:
        CheckpointError: before any read, if parameters are missing or have other shapes.
    """
    check(checkpoint, model)
    optimizers = () if optimizer is None else optimizer
    weights, moments = get_state_dict(model, optimizers)
    wanted: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        wanted["optimizer"] = moments
    with disk.reading(checkpoint), _alone():
        load_shards(wanted, checkpoint_id=checkpoint)
        moments = wanted.get("optimizer", {})
        set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=moments)
    return state_of(checkpoint)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Read the state file of a checkpoint. CheckpointError if it is missing or damaged."""
    if not (checkpoint / STATE).is_file():
        raise CheckpointError(f"{checkpoint} is no complete checkpoint: it has no {STATE}")
    with disk.reading(checkpoint / STATE):
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
        int(state["step"])
    return state


def check(checkpoint: Path, model: nn.Module) -> None:
    """Check that a checkpoint is complete and holds the model's parameters. Reads no weights.

    Args:
        checkpoint: its folder.
        model: may be on the meta device.
    Raises:
        CheckpointError: the checkpoint is incomplete or of another model.
    """
    state = state_of(checkpoint)
    if (checkpoint / ".metadata").is_file():
        with disk.reading(checkpoint / ".metadata"):
            entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        found = {
            key.removeprefix("model."): tuple(entry.size)
            for key, entry in entries.items()
            if key.startswith("model.") and hasattr(entry, "size")
        }
    else:  # DeepSpeed's: `zero3_checkpoint` writes the shapes to the state file
        with disk.reading(checkpoint / STATE):
            found = {name: tuple(shape) for name, shape in state.get("shapes", {}).items()}
    check_keys(checkpoint, found, shapes(model))


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; None if there is none."""
    found = sorted(p for p in folder.glob("step-*") if (p / STATE).is_file())
    return found[-1] if found else None


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The global shape of every key of the state dict, on the meta device and under ZeRO-3 too."""
    return {
        name: tuple(getattr(value, "ds_shape", value.shape))
        for name, value in model.state_dict(keep_vars=True).items()
    }


def export(
    folder: Path,
    model: nn.Module,
    dtype: torch.dtype | None = None,
    values: Callable[[list[str]], Iterator[tuple[str, Tensor]]] | None = None,
) -> Path:
    """Write consolidated safetensors: one file for each block, one for the rest, and an index.

    Hugging Face's tools read the index. All ranks gather the parameters together, one at a time.
    The folder appears complete and replaces an older one.

    Args:
        folder: to write.
        model: sharded or not.
        dtype: of the files; default: the parameters' own.
        values: gives whole tensors by name, on all ranks together; default: the parameters.
    Returns:
        `folder`.
    Raises:
        CheckpointError: on all ranks if a file cannot be written; names the last complete
            checkpoint in the parent folder.
    """
    from safetensors.torch import save_file

    names = list(model.state_dict())
    units = sorted({_unit(name) for name in names}, key=lambda u: (u < 0, u))
    index: dict[str, str] = {}
    size, main = 0, _rank() == 0
    beside = folder.with_name(f".partial-{folder.name}")

    def begin() -> None:
        if main:
            disk.remove(beside)
            beside.mkdir(parents=True)

    def end() -> None:
        if main:
            table = {"metadata": {"total_size": size}, "weight_map": index}
            (beside / INDEX).write_text(json.dumps(table, indent=1))
            disk.remove(folder)
            beside.rename(folder)

    def write(unit: int, file: str) -> int:
        """Write a unit's parameters; returns their bytes."""
        members: dict[str, Tensor] = {}
        members_of = values or (lambda chosen: whole_values(model, chosen))
        for name, value in members_of([n for n in names if _unit(n) == unit]):
            if main:
                members[name] = value.to(dtype or value.dtype).contiguous()
                index[name] = file

        def save() -> None:
            if main:
                save_file(members, beside / file)

        disk.together(save, folder / file, beside, gather, folder.parent)
        return sum([value.nbytes for value in members.values()])

    disk.together(begin, folder, beside, gather)
    for number, unit in enumerate(units, 1):
        size += write(unit, f"model-{number:05d}-of-{len(units):05d}.safetensors")
    disk.together(end, folder, beside, gather)
    return folder


def load_export(source: Path, model: Any, fresh_head: bool = False) -> None:
    """Read safetensors (a file, or a folder with an index) into a model.

    Each rank reads only the rows and columns of its shards, directly from the disk. A position
    embedding of another square grid is resampled.

    Args:
        source: the file or folder.
        model: sharded or not.
        fresh_head: do not load the classifier.
    Raises:
        CheckpointError: before any read, if names or shapes differ.
    """
    opened, grid = _opened(source, model, fresh_head)
    with torch.no_grad():
        for name, parameter in model.state_dict(keep_vars=True).items():
            if fresh_head and name.startswith("head."):
                continue
            with disk.reading(source):
                part = opened[name].get_slice(name)
                if grid and name == "pos_embed":
                    part = resampled(part[:], *grid)
                if hasattr(parameter, "ds_id"):
                    _into_partitioned(parameter, part)
                elif isinstance(parameter, DTensor):
                    parameter.to_local().copy_(part[slices_of(parameter)])
                else:
                    parameter.copy_(part[:])


def opened(source: Path, model: Any) -> dict[str, Any]:
    """The open file of each parameter. CheckpointError if names or shapes differ."""
    files, _ = _opened(source, model, False)
    return files


def check_export(source: Path, model: Any, fresh_head: bool = False) -> None:
    """Raise the errors of `load_export` without reading weights.

    The model may be on the meta device.
    """
    _opened(source, model, fresh_head)


def _opened(source: Path, model: Any, fresh_head: bool) -> tuple[dict[str, Any], Any]:
    """Open the files and check names and shapes.

    Returns:
        The open file of each parameter, and the (old, new) grids of the position embedding or None.
    """
    from safetensors import safe_open

    files = files_of(source)
    opened: dict[str, Any] = {}
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(files.values()) if files else [source]):
        try:
            here = safe_open(file, "pt")
        except Exception as error:  # SafetensorError, OSError or an error of torch's
            raise CheckpointError(f"{file} is missing or no safetensors file: {error}") from None
        for name in here.keys():  # noqa: SIM118  not a mapping
            found[name], opened[name] = tuple(here.get_slice(name).get_shape()), here
    wanted = shapes(model)
    if fresh_head:
        found = {n: s for n, s in found.items() if not n.startswith("head.")}
        found |= {n: s for n, s in wanted.items() if n.startswith("head.")}
    grid = _resampled(found, wanted)
    check_keys(source, {**found, **({"pos_embed": wanted["pos_embed"]} if grid else {})}, wanted)
    return opened, grid


def _resampled(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Any:
    """(old grid, new grid) if the position embeddings differ only in their grids, else None."""
    old, new = found.get("pos_embed"), wanted.get("pos_embed")
    if old is None or new is None or old == new or old[2] != new[2]:
        return None
    sides = [math.isqrt(shape[1]) for shape in (old, new)]
    if any(side**2 != shape[1] for side, shape in zip(sides, (old, new), strict=True)):
        return None
    return tuple((side, side) for side in sides)


def _into_partitioned(parameter: Any, part: Any) -> None:
    """Write a tensor to a parameter that ZeRO-3 has partitioned."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if _rank() == 0:
            parameter.data.copy_(part[:])


def slices_of(parameter: DTensor) -> tuple[slice, ...]:
    """The slices of the global tensor that this rank's shard holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def files_of(source: Path) -> dict[str, Path]:
    """The file of each parameter; empty if `source` is a single file."""
    if source.is_file():
        return {}
    if not (source / INDEX).is_file():
        raise CheckpointError(f"{source} is neither a safetensors file nor a folder with {INDEX}")
    with disk.reading(source / INDEX):
        table = json.loads((source / INDEX).read_text())["weight_map"]
        return {name: source / file for name, file in table.items()}


def whole_values(model: nn.Module, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield whole parameters on the CPU, one at a time. All ranks must take part."""
    state = model.state_dict(keep_vars=True)
    for name in names:
        value: Any = state[name]
        if hasattr(value, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([value]):
                yield name, value.detach().cpu().clone()
        elif isinstance(value, DTensor):
            yield name, value.full_tensor().detach().cpu()
        else:
            yield name, value.detach().cpu()


def _unit(name: str) -> int:
    """The number of a parameter's block; -1 outside the blocks."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Silence PyTorch's warning about a single process, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _rank() -> int:
    """The number of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(texts: list[str]) -> list[str]:
    """Join the lists of all ranks on every rank. Each rank waits for the others."""
    if not dist.is_initialized():
        return texts
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, texts)
    return [text for own in gathered for text in own]
