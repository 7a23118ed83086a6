"""Soak test: thousands of training steps with every preset, and with fused forwards, against leaks.

The script watches resident memory and the tensors saved for the backward. Two steps of ten raise,
one in the forward and one in the backward, as a bad batch of a training run would.

It prints a row for each policy and appends the row to docs/results/soak.jsonl, with the slope of
resident memory over the second half of the steps. It fails if a slope exceeds `--limit` bytes per
step, or if a saved tensor outlives its step. A leak of one stash a step would be 8 KiB or more. The
allocator's noise is tens of bytes per step over 2,000 steps.

Steps are under bfloat16 autocast. A processor that only emulates bfloat16 uses it in one step of
three, and float32 in the others.

    python scripts/bench/soak.py                         2,000 steps of each policy
    python scripts/bench/soak.py --steps 300 --out ''    a short look
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import mesa_train
from mesa_train.utils import records
from mesa_train.utils.precision import choose

PAGE = 4096
RESULTS = Path(__file__).resolve().parents[2] / "docs/results/soak.jsonl"
POLICIES = {
    **mesa_train.PRESETS,
    "mesa8, fused forward": dataclasses.replace(mesa_train.PRESETS["mesa8"], forward="fused"),
}


class _Fails(torch.autograd.Function):
    """The identity, with a backward that raises."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # noqa: ARG004
        raise ArithmeticError("backward")


class SavedTensors:
    """Context manager that records the tensors saved for the backward, without Parameters."""

    def __init__(self) -> None:
        self.storages: list[StorageWeakRef] = []
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        """Record the storage of a saved tensor."""
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            self.storages.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def __enter__(self) -> SavedTensors:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def remaining(self) -> int:
        """The number of recorded storages that still exist."""
        return len([s for s in self.storages if not s.expired()])


def main(
    steps: Annotated[int, typer.Option(min=300, help="Steps with each policy.")] = 2000,
    limit: Annotated[float, typer.Option(help="Largest growth in bytes per step.")] = 500.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    out: Annotated[str, typer.Option(help="File for the rows; '' for none.")] = str(RESULTS),
) -> None:
    """Measure resident memory over many steps of every policy."""
    torch.manual_seed(0)
    grown = []
    for name, policy in POLICIES.items():
        result = soak(policy, steps, batch_size)
        print(
            f"{name:22} {steps} steps   {result['slope_bytes_per_step']:+10.1f} bytes per step   "
            f"now {result['resident_bytes'] / 2**20:.1f} MiB   not freed {result['left']}",
            flush=True,
        )
        if out:
            size = {"model": "a ViT of two blocks, width 64", "batch_size": batch_size}
            row = {"policy": name, "steps": steps, **size, **result, **records.provenance()}
            records.append(Path(out), row)
        if result["slope_bytes_per_step"] > limit or result["left"]:
            grown.append(name)
    if grown:
        raise SystemExit(f"soak: memory grows with {', '.join(grown)}")


def soak(policy: mesa_train.Policy, steps: int, batch_size: int) -> records.Row:
    """Train under one policy.

    Returns:
        The slope of resident memory over the second half of the steps, the memory at the end, the
            number of failed steps, and the number of storages that outlived their step.
    """
    model = mesa_train.wrap(_small_vit(), policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    memory: list[tuple[int, int]] = []
    failed = remaining = 0
    bf16_interval = 3 if choose("bf16", "cpu").emulated else 1
    # The garbage collector then visits only objects of the steps, not all imported modules.
    gc.freeze()
    previous = SavedTensors()
    for step in range(steps):
        saved = SavedTensors()
        bf16 = step % bf16_interval == 0
        failed += not _step(model, optimizer, torch.randn(batch_size, 3, 32, 32), step, saved, bf16)
        if step % 50 in (14, 15, 18):
            # Objects of a failed backward are freed with the next backward that works.
            gc.collect()
            remaining += saved.remaining() + previous.remaining()
        if step % 50 == 15 and step >= steps // 2:
            memory.append((step, resident()))
        previous = saved
    return {
        "slope_bytes_per_step": round(slope_of(memory), 1),
        "resident_bytes": resident(),
        "failed": failed,
        "left": remaining,
    }


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    step: int,
    saved: SavedTensors,
    bf16: bool,
) -> bool:
    """Run one step, under bfloat16 autocast if `bf16`. Return whether the step completed."""
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), saved:
            loss = _run(model, images, step)
        loss.backward()
        optimizer.step()
    except ArithmeticError:
        return False
    finally:
        optimizer.zero_grad()
    return True


def _small_vit() -> nn.Module:
    """A ViT of two blocks and width 64."""
    import timm

    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, drop_rate=0.1, **size)


def _run(model: nn.Module, images: Tensor, step: int) -> Tensor:
    """The loss. In two steps of ten, a hook in the middle of the model raises."""
    if step % 10 not in (3, 7):
        return model(images).float().square().mean()

    def fail(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG001
        if step % 10 == 3:
            raise ArithmeticError("forward")
        return (_Fails.apply(arguments[0]), *arguments[1:])

    middle = [m for m in model.modules() if isinstance(m, nn.Linear)][-2]
    handle = middle.register_forward_pre_hook(fail)
    try:
        return model(images).float().square().mean()
    finally:
        handle.remove()


def resident() -> int:
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * PAGE


def slope_of(points: list[tuple[int, int]]) -> float:
    """The least-squares slope of (step, bytes)."""
    steps = torch.tensor([s for s, _ in points], dtype=torch.float64)
    sizes = torch.tensor([b for _, b in points], dtype=torch.float64)
    steps = steps - steps.mean()
    return float((steps * (sizes - sizes.mean())).sum() / steps.square().sum())


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
