"""Pictures of the efficient models: kept tokens, found architectures, tokens and bytes by block.

python scripts/bench/efficient_pictures.py tokens --run runs/dynamicvit_quickstart
python scripts/bench/efficient_pictures.py architecture runs/spvit_quickstart_search/architecture.json
python scripts/bench/efficient_pictures.py blocks --model hvt_s_4
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from pictures import built, load_images
from torch import Tensor

import mesa_train
import mesa_train.models
from mesa_train.models.spvit.layers import ATTENTION, CONV1, CONV3, SKIP
from mesa_train.report import figures as plots
from mesa_train.training.config_schema import ConfigError

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"
_KINDS = {
    "attention": "#0072B2",
    "3x3 convolution": "#E69F00",
    "1x1 convolution": "#56B4E9",
    "skip": "#BBBBBB",
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def tokens(
    run: Annotated[Path | None, typer.Option(help="A DynamicViT run: its best weights.")] = None,
    model: Annotated[str, typer.Option(help="Without a run: a DynamicViT.")] = "dynamicvit_deit_s",
    weights: Annotated[Path | None, typer.Option(help="safetensors, or the authors' .pth.")] = None,
    image: Annotated[Path | None, typer.Option(help="Default: images of the run's data.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Number of images without --image.")] = 6,
    out: Annotated[Path, typer.Option()] = RESULTS / "dynamicvit_tokens.png",
) -> None:
    """Draw images, and the tokens that are left after each predictor."""
    try:
        settings, network = built(run, model, weights, None)
        pixels = load_images(settings, image, images)
    except ConfigError as error:
        raise SystemExit(f"efficient_pictures: {error}") from None
    if not hasattr(network, "prune"):
        raise SystemExit(f"efficient_pictures: {settings.model.name} is no DynamicViT")
    with torch.no_grad():
        pruned = network.prune(pixels)
    grid = network.patch_embed.grid_size
    stages = [torch.arange(grid[0] * grid[1]).expand(len(pixels), -1), *pruned.kept]
    figure, axes = plots.figure(
        len(stages), f"{settings.model.name} on {settings.data.source}: the tokens that are left"
    )
    for number, (axis, kept) in enumerate(zip(axes, stages, strict=True)):
        rows = [dimmed(one, positions, grid) for one, positions in zip(pixels, kept, strict=True)]
        axis.imshow(torch.cat(rows).numpy())
        name = f"after predictor {number}" if number else "input"
        axis.set_title(f"{name}\n{kept.shape[1]} tokens", fontsize=9)
        axis.axis("off")
    figure.set_size_inches(1.5 * len(stages), 0.9 + 1.4 * len(pixels))
    plots.save(figure, out)
    print(f"picture {out}")


def dimmed(image: Tensor, kept: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image (H, W, 3) in [0, 1] whose other patches are light red.

    Args:
        image: normalised, (3, H, W).
        kept: positions of the kept patches.
        grid: patches in a column and in a row.
    """
    low, high = image.min(), image.max()
    shown = ((image - low) / (high - low)).permute(1, 2, 0)
    mask = torch.zeros(grid[0] * grid[1])
    mask[kept] = 1
    mask = mask.view(1, 1, *grid)
    mask = torch.nn.functional.interpolate(mask, size=image.shape[1:])[0, 0].unsqueeze(-1)
    shown = mask * shown + (1 - mask) * torch.tensor([1.0, 0.85, 0.85])
    return torch.nn.functional.pad(shown, (0, 0, 1, 1, 1, 1), value=1.0)


@app.command()
def architecture(
    found: Annotated[Path, typer.Argument(help="architecture.json of a search.")],
    out: Annotated[Path, typer.Option()] = RESULTS / "spvit_architecture.png",
) -> None:
    """Draw the kind of each attention layer, and the hidden units that each MLP keeps."""
    try:
        values: dict[str, Any] = json.loads(found.read_text())
        kinds = [kind_of(indicators) for indicators in values["msa"]]
        units, masks = values["ffn_keep"], list(values["masks"].values())
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"efficient_pictures: {found}: no architecture ({error})") from None
    billions = values["flops"] / 1e9
    figure, (axis,) = plots.figure(1, f"Found architecture, {billions:.3f} G multiply-adds")
    blocks = np.arange(len(units))
    axis.bar(blocks, [len(mask) for mask in masks], color="#EEEEEE", label="hidden units before")
    axis.bar(blocks, units, color="#009E73", label="hidden units kept")
    top = 1.16 * max(len(mask) for mask in masks)
    for kind, colour in _KINDS.items():
        members = [block for block in blocks if kinds[block] == kind]
        if members:
            axis.scatter(members, [top] * len(members), s=90, marker="s", color=colour, label=kind)
    axis.set_xlabel("block (squares: what its attention layer became)")
    axis.set_ylabel("hidden units of its MLP")
    axis.set_xticks(blocks)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    figure.set_size_inches(max(6.4, 0.5 * len(units)), 4.6)
    plots.save(figure, out)
    print(f"picture {out}")


def kind_of(indicators: list[int]) -> str:
    """The name of the kind of layer that three indicators stand for."""
    kinds: tuple[tuple[int, ...], ...] = (ATTENTION, CONV3, CONV1, SKIP)
    return list(_KINDS)[kinds.index(tuple(indicators))]


@app.command()
def blocks(
    model: Annotated[str, typer.Option(help="A HVT model.")] = "hvt_s_4",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    out: Annotated[Path, typer.Option()] = RESULTS / "hvt_tokens.png",
) -> None:
    """Draw the tokens of each block, and the bytes that the block saves, plain and under mesa8."""
    if not model.startswith("hvt_") or not timm.is_model(model):
        raise SystemExit(f"efficient_pictures: --model: {model} is no HVT")
    with torch.device("meta"):
        network = timm.create_model(model).train()
    images = torch.empty(batch_size, 3, 224, 224, device="meta")
    counts: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
        for block in network.blocks
    ]
    saved = {}
    for method in ("plain", "mesa8"):
        counts.clear()
        by_module = mesa_train.footprint(network, images, policy=method).by_module
        saved[method] = [
            sum(size for name, size in by_module.items() if inside(name, f"blocks.{number}"))
            for number in range(len(network.blocks))
        ]
    for hook in hooks:
        hook.remove()
    figure, (left, right) = plots.figure(2, f"{model} at 224 px, batch {batch_size}, float32")
    numbers = np.arange(len(counts))
    left.step(numbers, counts, where="mid", color="#0072B2")
    left.scatter(numbers, counts, color="#0072B2", s=18)
    for number, count in enumerate(counts):
        if number == 0 or counts[number - 1] != count:
            left.annotate(str(count), (number, count), (3, 5), textcoords="offset points")
    left.set_title("tokens in the block", fontsize=10)
    palette = plots.colours(["plain", "mesa8"])
    for offset, (method, sizes) in zip((-0.2, 0.2), saved.items(), strict=True):
        right.bar(
            numbers + offset, [s / 2**20 for s in sizes], 0.4, color=palette[method], label=method
        )
    right.set_title("MiB that the block saves", fontsize=10)
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("block")
        axis.set_xticks(numbers)
        axis.set_ylim(bottom=0)
    plots.save(figure, out)
    print(f"picture {out}")


def inside(name: str, module: str) -> bool:
    """True if a module is `module` or a part of it."""
    return name == module or name.startswith(f"{module}.")


if __name__ == "__main__":
    app()
