"""Plot of the sampling points of deformable token merging: LIT's figure, for one last-stage token.

A token of the last stage merges 2x2 points of stage 3, each of these merges 2x2 points of stage 2,
and so on: 4, 16 and 64 points. Grey squares mark the regular grid, coloured dots the points after
the offsets.

    python scripts/bench/plot_dtm.py --model litv2_s --weights litv2_s.pth --image photo.jpg
    python scripts/bench/plot_dtm.py --run runs/litv2_quickstart
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pictures import built, load_images
from torch import Tensor, nn

from mesa_train.models.lit.deformable_merging import DeformConv
from mesa_train.report import figures as plots
from mesa_train.training.config_schema import ConfigError

COLOURS = ("#0072B2", "#009E73", "#D55E00")
LEVELS = ("4 points of stage 3", "16 of stage 2", "64 of stage 1")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(
    run: Annotated[Path | None, typer.Option(help="A recipe's run: its best weights.")] = None,
    model: Annotated[str, typer.Option(help="Without a run: a LITv2 or LIT model.")] = "litv2_s",
    weights: Annotated[Path | None, typer.Option(help="safetensors, or the authors' .pth.")] = None,
    image: Annotated[Path | None, typer.Option(help="Default: images of the run's data.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Number of images without --image.")] = 4,
    image_size: Annotated[int | None, typer.Option(min=29, help="Default: the run's own.")] = None,
    out: Annotated[Path, typer.Option()] = Path("runs/dtm.png"),
) -> None:
    """Draw the sampled points of the middle token of the last stage."""
    try:
        settings, network = built(run, model, weights, image_size)
        batch = load_images(settings, image, images)
    except ConfigError as error:
        raise SystemExit(f"plot_dtm: {error}") from None
    figure, axes = plots.figure(len(batch), f"{settings.model.name}: points that one token samples")
    for axis, picture, points, grid in zip(
        axes, batch, *sampled_points(network, batch), strict=True
    ):
        pixels = picture * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        axis.imshow(pixels.clamp(0, 1).permute(1, 2, 0).numpy())
        axis.axis("off")
        for level, (colour, label) in enumerate(zip(COLOURS, LEVELS, strict=True)):
            size = 90 / 3**level
            (gy, gx), (y, x) = grid[level].T.tolist(), points[level].T.tolist()
            axis.scatter(gx, gy, s=size, c="#999999", marker="s", linewidths=0)
            axis.scatter(x, y, s=size, c=colour, linewidths=0, label=label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    plots.save(figure, out)
    print(f"picture {out}")


@torch.no_grad()
def sampled_points(model: nn.Module, images: Tensor) -> tuple[list[Any], list[Any]]:
    """The points of each image and level, (4, 2), (16, 2), (64, 2) in pixels (y, x).

    Returns:
        (points with offsets, regular points).
    """
    merges = [m for m in model.modules() if isinstance(m, DeformConv)]
    offsets: list[Tensor] = []
    hooks = [
        m.conv_offset.register_forward_hook(lambda _m, _i, out: offsets.append(out.float()))
        for m in merges
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    points: tuple[list[Any], list[Any]] = ([], [])
    for index in range(len(images)):
        maps = [o[index] for o in offsets]
        middle = torch.tensor([[(s - 1) // 2 for s in maps[-1].shape[1:]]]).float()
        for levels, with_offsets in zip(points, (True, False), strict=True):
            levels.append(_trace(maps, middle, with_offsets))
    return points


def _trace(maps: list[Tensor], start: Tensor, with_offsets: bool) -> list[Tensor]:
    """The points of each level in pixels, from the last merge to the first."""
    points, levels = start, []
    for depth, offset in enumerate(reversed(maps)):
        nearest = points.round().long()
        rows = nearest[:, 0].clamp(0, offset.shape[1] - 1)
        columns = nearest[:, 1].clamp(0, offset.shape[2] - 1)
        taps = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).float()
        shift = offset[:, rows, columns].T.view(-1, 4, 2) if with_offsets else 0
        points = (2 * points[:, None] + taps + shift).flatten(0, 1)
        # Pixels that a token of the finer map covers.
        stride = 4 * 2 ** (len(maps) - 1 - depth)
        levels.append((points + 0.5) * stride - 0.5)
    return levels


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
