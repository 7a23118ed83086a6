"""Sweep of timm: one small variant of every model file; outputs, gradients and saved bytes.

The script compares each policy with plain PyTorch. It uses random weights, float32, and the
smallest batch and image that the model accepts and whose batch norms average over 16 values. One
row for each file goes to docs/results/sweep_timm.jsonl. A second run continues after the last row.

    python scripts/bench/sweep_timm.py
    python scripts/bench/sweep_timm.py --files beit,swin_transformer --again
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from sweeping import Make, sweep_makers
from timm.models._registry import _module_to_models
from torch import nn

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/sweep_timm.jsonl"
SIZES = (64, 96, 128, 160, 192, 224, 256)
# Words in the names of small variants, the smallest first.
SMALL = "test_ femto atto nano pico xxs xxt tiny _ti micro mini _xs small _s _0 18 26 base".split()
LARGEST = 100_000_000  # parameters
# Values over which each batch norm must average. With two values, the derivative through the norm
# is nearly 0, so every error is large relative to it.
MIN_VALUES = 16


def main(
    files: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    seconds: Annotated[int, typer.Option(min=1, help="Limit per model.")] = 90,
    again: Annotated[bool, typer.Option("--again", help="Repeat files with a row.")] = False,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Compare one variant of each file."""
    selected = [f.strip() for f in files.split(",") if f.strip()] or sorted(_module_to_models)
    unknown = sorted(set(selected) - set(_module_to_models))
    if unknown:
        raise SystemExit(f"sweep_timm: timm has no model file {', '.join(unknown)}")
    sweep_makers(makers(selected), out, seconds, again)


def makers(files: list[str]) -> Iterator[tuple[str, Make]]:
    """(name of the file, function that builds its variant and images)."""
    for file in files:
        yield file, functools.partial(smallest, file)


def smallest(file: str) -> tuple[nn.Module, torch.Tensor]:
    """The smallest of a file's likely variants, with the smallest batch that it accepts."""
    names = sorted(_module_to_models[file], key=lambda name: (_rank(name), len(name)))
    sizes = {}
    for name in names[:4]:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10)
        sizes[name] = sum(p.numel() for p in model.parameters())
    name = min(sizes, key=sizes.__getitem__)
    if sizes[name] > LARGEST:
        raise ValueError(f"{name} has {sizes[name]:,} parameters")
    default = timm.get_pretrained_cfg(name)
    channels, largest = (default.input_size[0], default.input_size[-1]) if default else (3, 224)
    for min_values in (MIN_VALUES, 2):
        for batch, size in itertools.product((2, MIN_VALUES), (*SIZES, largest)):
            for options in ({"img_size": size}, {}):
                if _accepts(name, options, (batch, channels, size, size), min_values):
                    model = timm.create_model(name, num_classes=10, **options)
                    return model, torch.randn(batch, channels, size, size)
    raise ValueError(f"{name} accepts no image of {SIZES}")


def _accepts(name: str, options: dict[str, Any], shape: tuple[int, ...], min_values: int) -> bool:
    """True if a variant accepts a batch of this shape, checked on the meta device.

    Each of its batch norms must average over at least `least` values.
    """

    def check(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() < min_values * inputs[0].shape[1]:
            raise ValueError("too few values")

    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10, **options)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.register_forward_pre_hook(check)
            # Batch norm over one element raises only in training.
            model.train()(torch.empty(shape))
    except Exception:  # each model raises its own type of error
        return False
    return True


def _rank(name: str) -> int:
    """The rank of a name by size, the smallest first."""
    return next((i for i, word in enumerate(SMALL) if word in name), len(SMALL))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
