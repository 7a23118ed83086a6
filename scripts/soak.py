"""Trains a small model for thousands of steps with every preset in turn and watches resident memory.

Every tenth step raises in the forward or in the backward, as a training run's bad batch would. Prints
one line per preset with the slope of resident memory over the second half of its steps; fails if a slope
exceeds `--limit` bytes per step. A leak of one stash a step would be 8 KiB or more; what an allocator
does is noise of tens of bytes per step over 2,000 steps.

    python scripts/soak.py                    2,000 steps with each preset
    python scripts/soak.py --steps 200        a short look
"""

from __future__ import annotations

import gc
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import mesa_train

PAGE = 4096


class _Fails(torch.autograd.Function):
    """Raises in its backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # noqa: ARG004
        raise ArithmeticError("backward")


def main(
    steps: Annotated[int, typer.Option(min=40, help="Steps with each preset.")] = 2000,
    limit: Annotated[float, typer.Option(help="Most bytes per step a preset may grow by.")] = 500.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    """Resident memory over many steps of every preset."""
    torch.manual_seed(0)
    grown = []
    for name in mesa_train.PRESETS:
        slope = soak(name, steps, batch_size)
        print(
            f"{name:18} {steps} steps   {slope:+10.1f} bytes per step   now {resident() / 2**20:.1f} MiB"
        )
        if slope > limit:
            grown.append(name)
    if grown:
        raise SystemExit(f"soak: memory grows with {', '.join(grown)}")


def soak(preset: str, steps: int, batch_size: int) -> float:
    """Bytes per step that resident memory grows by, over the second half of the steps."""
    policy = mesa_train.Policy.preset(preset)
    model = mesa_train.wrap(_small_vit(), policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shape = (batch_size, 3, 32, 32)
    seen: list[tuple[int, int]] = []
    for step in range(steps):
        images = torch.randn(shape)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                loss = _run(model, images, step)
            loss.backward()
        except ArithmeticError:
            optimizer.zero_grad()
            continue
        optimizer.step()
        optimizer.zero_grad()
        if step >= steps // 2 and step % 10 == 5:
            gc.collect()
            seen.append((step, resident()))
    return slope_of(seen)


def _small_vit() -> nn.Module:
    import timm

    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, drop_rate=0.1, **size)


def _run(model: nn.Module, images: Tensor, step: int) -> Tensor:
    """The loss; now and then a hook in the middle of the model fails."""
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
