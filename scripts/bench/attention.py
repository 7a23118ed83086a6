"""Benchmark of one attention layer of each kind: parameters, operations, time and saved bytes.

The layers are HiLo, full attention, windows, shifted windows and spatial reduction (PVT), each of
width 768 with 12 heads on a map of tokens. Saved bytes are counted for `--count-batch` images on
the meta device. Times are medians over rounds in which all layers take turns, after warm-up.

    python scripts/bench/attention.py --side 14 --batch 8
    python scripts/bench/attention.py --side 64 --batch 1
    python scripts/bench/attention.py --side 14 --batch 64 --device cuda
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mesa_train
from mesa_train.models.lit.hilo import HiLo
from mesa_train.utils import records
from mesa_train.utils.formatting import format_bytes

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/bench_attention.jsonl"
DIM, HEADS = 768, 12


class MSA(nn.Module):
    """Fused attention of every token to every token."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, HEADS, DIM // HEADS)
        out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds of the matmuls for one map."""
        tokens = height * width
        return tokens * (4 * DIM**2 + 2 * tokens * DIM)


class Windows(nn.Module):
    """Swin's attention in windows of 7x7 (8x8 if 8 divides the map), shifted or not."""

    def __init__(self, side: int, shifted: bool) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformerBlock

        self.window = 8 if side % 8 == 0 else 7
        block = SwinTransformerBlock(
            DIM, (side, side), HEADS, window_size=self.window, shift_size=self.window // 2 * shifted
        )
        block.norm1 = block.norm2 = block.mlp = nn.Identity()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block._attn(x)

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds of the matmuls for one map."""
        return height * width * (4 * DIM**2 + 2 * self.window**2 * DIM)


class SpatialReduction(nn.Module):
    """PVT's attention to a map that a convolution reduces to a quarter of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        from timm.models.pvt_v2 import Attention

        self.attn = Attention(DIM, HEADS, sr_ratio=2, linear_attn=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2), list(x.shape[1:3])).view(x.shape)

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds of the matmuls for one map."""
        tokens, pooled = height * width, height * width // 4
        return tokens * 2 * DIM**2 + pooled * (4 + 2) * DIM**2 + 2 * tokens * pooled * DIM


def layers(side: int) -> dict[str, Any]:
    """The compared layers for maps of side x side."""
    return {
        "HiLo": HiLo(DIM, HEADS, window=2, alpha=0.9, qkv_bias=True),
        "MSA": MSA(),
        "windows": Windows(side, shifted=False),
        "shifted windows": Windows(side, shifted=True),
        "spatial reduction": SpatialReduction(),
    }


def main(
    side: Annotated[int, typer.Option(help="Tokens along a side: 14 or 64.")] = 14,
    batch: Annotated[int, typer.Option(min=1, help="Images when timing.")] = 8,
    count_batch: Annotated[int, typer.Option(min=1, help="Images when counting bytes.")] = 64,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Measure every layer and append a row for each."""
    rows: list[records.Row] = [
        {
            "layer": name,
            "side": side,
            "dim": DIM,
            "heads": HEADS,
            **counted(name, side, count_batch),
        }
        for name in layers(side)
    ]
    times = timed(side, batch, rounds, device)
    for row in rows:
        row |= {"batch": batch, **times[row["layer"]], **records.provenance(device)}
    records.append(out, *rows)
    table = Table(title=f"{side}x{side} tokens, {DIM} channels, {HEADS} heads, bf16 autocast")
    for heading in (
        "layer", "parameters", "GMACs", "forward", "training step", "with mesa8",
        f"saved, batch {count_batch}", "with mesa8",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in rows:
        table.add_row(
            row["layer"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['macs'] / 1e9:.3f}",
            f"{row['forward_ms']:.1f} ms",
            f"{row['train_ms']:.1f} ms",
            f"{row['mesa8_train_ms']:.1f} ms",
            format_bytes(row["saved_bytes"]),
            format_bytes(row["mesa8_saved_bytes"]),
        )
    Console().print(table)


def counted(name: str, side: int, batch: int) -> dict[str, int]:
    """Parameters, multiply-adds of one map, and saved bytes of `batch` maps for each policy."""
    with torch.device("meta"):
        layer = layers(side)[name]
    # A norm precedes an attention layer, and the count includes the norm's saved bytes.
    model = nn.Sequential(nn.LayerNorm(DIM, device="meta"), layer)
    maps = torch.empty(batch, side, side, DIM, device="meta", requires_grad=True)
    saved = {
        policy: mesa_train.footprint(
            model, maps, policy=policy, autocast=torch.bfloat16
        ).saved_bytes
        for policy in ("plain", "mesa8")
    }
    return {
        "parameters": sum(p.numel() for p in layer.parameters()),
        "macs": layer.flops(side, side),
        "count_batch": batch,
        "saved_bytes": saved["plain"],
        "mesa8_saved_bytes": saved["mesa8"],
    }


def timed(side: int, batch: int, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Median milliseconds of a forward without gradients and of a training step."""
    torch.manual_seed(0)
    maps = torch.randn(batch, side, side, DIM, device=device)
    calls: dict[tuple[str, str], Callable[[], None]] = {}
    for name, layer in layers(side).items():
        plain = nn.Sequential(nn.LayerNorm(DIM), layer).to(device)
        coded = nn.Sequential(nn.LayerNorm(DIM), layers(side)[name]).to(device)
        mesa_train.wrap(coded, "mesa8")
        calls[name, "forward_ms"] = _forward(plain, maps)
        calls[name, "train_ms"] = _train(plain, maps)
        calls[name, "mesa8_train_ms"] = _train(coded, maps)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(rounds + 2):
        for key in sorted(calls, reverse=bool(turn % 2)):
            start = time.perf_counter()
            calls[key]()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # two rounds warm up
                times[key].append(1e3 * (time.perf_counter() - start))
    medians: dict[str, dict[str, float]] = {}
    for (name, measure), values in times.items():
        quartiles = statistics.quantiles(values, n=4)
        medians.setdefault(name, {})[measure] = statistics.median(values)
        medians[name][f"{measure}_low"], medians[name][f"{measure}_high"] = (
            quartiles[0],
            quartiles[2],
        )
    return medians


def _forward(model: nn.Module, maps: Tensor) -> Callable[[], None]:
    """A forward without gradients."""

    def call() -> None:
        with torch.no_grad(), torch.autocast(maps.device.type, torch.bfloat16):
            model(maps)

    return call


def _train(model: nn.Module, maps: Tensor) -> Callable[[], None]:
    """A forward and a backward."""
    leaf = maps.clone().requires_grad_()

    def call() -> None:
        with torch.autocast(maps.device.type, torch.bfloat16):
            out = model(leaf)
        out.float().square().mean().backward()
        leaf.grad = None
        model.zero_grad()

    return call


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
