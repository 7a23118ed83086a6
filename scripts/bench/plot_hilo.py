"""Plot of the frequencies in the outputs of HiLo's two branches.

For every block with HiLo, the plot shows log |FFT| of the Hi-Fi and the Lo-Fi output, averaged over
images and channels, with low frequencies in the middle. It also gives the share of high
frequencies.

    python scripts/bench/plot_hilo.py --run runs/litv2_quickstart
    python scripts/bench/plot_hilo.py --model litv2_s --weights litv2_s.pth --image photo.jpg
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pictures import built, load_images
from torch import Tensor, nn

from mesa_train.models.lit.hilo import HiLo
from mesa_train.report import figures as plots
from mesa_train.training.config_schema import ConfigError


def main(
    run: Annotated[Path | None, typer.Option(help="A recipe's run: its best weights.")] = None,
    model: Annotated[str, typer.Option(help="Without a run: a LITv2 model.")] = "litv2_s",
    weights: Annotated[Path | None, typer.Option(help="safetensors, or the authors' .pth.")] = None,
    image: Annotated[Path | None, typer.Option(help="Default: images of the run's data.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Number of images without --image.")] = 64,
    image_size: Annotated[int | None, typer.Option(min=29, help="Default: the run's own.")] = None,
    out: Annotated[Path, typer.Option()] = Path("runs/hilo.png"),
) -> None:
    """Draw both branches of up to four blocks."""
    try:
        settings, network = built(run, model, weights, image_size)
        by_layer = spectra(network, load_images(settings, image, images))
    except ConfigError as error:
        raise SystemExit(f"plot_hilo: {error}") from None
    if not by_layer:
        raise SystemExit(f"plot_hilo: {settings.model.name} has no layer with both branches")
    shown = list(by_layer.items())[:4]
    figure, axes = plots.figure(2 * len(shown), f"{settings.model.name}: frequency magnitude")
    panels = [
        (f"{n}\n{b}", s) for n, both in shown for b, s in zip(("Hi-Fi", "Lo-Fi"), both, strict=True)
    ]
    for axis, (title, spectrum) in zip(axes, panels, strict=True):
        axis.imshow(spectrum.numpy(), cmap="viridis")
        axis.set_title(f"{title}: {high_share(spectrum):.0%} high", fontsize=9)
        axis.axis("off")
    plots.save(figure, out)
    print(f"picture {out}")


@torch.no_grad()
def spectra(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean log magnitude (H, W) of both branches, by the name of each layer that has both."""
    maps: dict[str, list[Tensor]] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, HiLo) and layer.hi_heads and layer.lo_heads:
            for projection in (layer.h_proj, layer.l_proj):
                hooks.append(
                    projection.register_forward_hook(_append_output(maps.setdefault(name, [])))
                )
    model(images)
    for hook in hooks:
        hook.remove()
    return {name: (_log_magnitude(both[0]), _log_magnitude(both[1])) for name, both in maps.items()}


def high_share(spectrum: Tensor) -> float:
    """Share of the magnitude outside the middle half of the spectrum."""
    height, width = spectrum.shape
    magnitude = spectrum.exp()
    low = magnitude[height // 4 : height - height // 4, width // 4 : width - width // 4]
    return 1 - (low.sum() / magnitude.sum()).item()


def _append_output(outputs: list[Tensor]) -> Any:
    """A hook that stores a branch's output."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs.append(output.float())

    return hook


def _log_magnitude(maps: Tensor) -> Tensor:
    """Mean log magnitude (H, W) of maps (B, H, W, C)."""
    transformed = torch.fft.fftshift(torch.fft.fft2(maps, dim=(1, 2)), dim=(1, 2))
    return transformed.abs().clamp_min(1e-8).log().mean((0, 3))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
