"""Benchmark of one attention layer of each kind: parameters, operations, time and saved bytes.

The layers are those of `mesa_train.models.attention`, of width 768 with 12 heads, on maps of tokens.
Where windows of 7 do not divide a map and windows of 8 do, windows are of 8. Multiply-adds follow
the rules of the published benchmark. Saved bytes are counted for `--count-batch` images on the meta
device, for bf16 autocast. Times are medians over rounds in which all layers take turns, after warm-up.
A processor that only emulates bfloat16 is timed in float32.

    python scripts/bench/attention.py                       maps of 14x14 and 64x64
    python scripts/bench/attention.py --counts-only         seconds, no times
    python scripts/bench/attention.py --side 14 --batch 64 --device cuda
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mesa_train
from mesa_train.measure.step import autocasting
from mesa_train.models.attention import AttentionLayer, create_attention
from mesa_train.utils import records
from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.precision import choose

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/bench_attention.jsonl"
DIM, HEADS = 768, 12

# (label, name in `mesa_train.models.attention`, options; "side": the side of a window)
CONTESTANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("HiLo", "hilo", {}),
    ("MSA", "msa", {}),
    ("windows", "window", {"window": "side"}),
    ("shifted windows", "shifted_window", {"window": "side"}),
    ("crossed stripes (CSWin)", "cross_window", {"stripe": "side"}),
    ("spatial reduction (PVT)", "sra", {}),
    ("linear spatial reduction (PVTv2)", "linear_sra", {}),
    ("Twins, local", "twins_local", {"window": "side"}),
    ("Twins, global", "twins_global", {}),
    ("Linformer, 256 keys", "linformer", {"keys": 256}),
    ("Linformer, 64 keys", "linformer", {"keys": 64}),
    ("Performer, 256 features", "performer", {"features": 256}),
    ("Performer, 64 features", "performer", {"features": 64}),
    ("XCA (XCiT)", "xca", {}),
    ("EcoFormer", "ecoformer", {}),
    ("focal", "focal", {"window": "side"}),
    ("QuadTree", "quadtree", {}),
    ("deformable (DAT)", "dat", {}),
    ("VAN, convolutions", "van", {}),
    ("HorNet, convolutions", "hornet", {}),
)
LABELS = tuple(label for label, _, _ in CONTESTANTS)


def build(label: str, side: int) -> tuple[AttentionLayer, dict[str, Any]]:
    """(the layer of a label for maps of side x side, its options)."""
    name, options = next((name, options) for own, name, options in CONTESTANTS if own == label)
    window = 8 if side % 7 and side % 8 == 0 else 7
    options = {key: window if value == "side" else value for key, value in options.items()}
    return create_attention(name, DIM, HEADS, side, side, **options), options


def main(
    side: Annotated[list[int], typer.Option(min=1, help="Tokens along a side.")] = [14, 64],  # noqa: B006
    batch: Annotated[
        int, typer.Option(min=0, help="Images when timing; 0: as many as have about 1,568 tokens.")
    ] = 0,
    count_batch: Annotated[int, typer.Option(min=1, help="Images when counting bytes.")] = 64,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[
        str, typer.Option(help="When timing: no (float32), bf16, fp16 or auto.")
    ] = "auto",
    counts_only: Annotated[bool, typer.Option("--counts-only", help="Measure no times.")] = False,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Measure every layer and append a row for each."""
    for one_side in side:
        images = batch or max(1, 8 * 14 * 14 // one_side**2)
        rows: list[records.Row] = [
            {"layer": label, "side": one_side, **counted(label, one_side, count_batch)}
            for label in LABELS
        ]
        if not counts_only:
            choice = choose(precision, device)
            times = timed(one_side, images, rounds, device, choice.dtype)
            for row in rows:
                row |= {"batch": images, "timed_in": choice.name, **times[row["layer"]]}
        records.append(out, *[row | records.provenance(device) for row in rows])
        Console().print(report(rows))


def report(rows: list[records.Row]) -> Table:
    """The rows of one size of map as a table for the terminal."""
    first = rows[0]
    timed_rows = "forward_ms" in first
    side = f"{first['side']}x{first['side']}"
    title = f"{side} tokens, {DIM} channels, {HEADS} heads, bytes of bf16 autocast"
    table = Table(title=f"{title}, times of {first['timed_in']}" if timed_rows else title)
    headings = ["layer", "parameters", "GMACs"]
    headings += ["forward", "training step", "with mesa8"] if timed_rows else []
    headings += [f"saved, batch {first['count_batch']}", "with mesa8"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in rows:
        times = ("forward_ms", "train_ms", "mesa8_train_ms") if timed_rows else ()
        table.add_row(
            row["layer"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['macs'] / 1e9:.3f}",
            *[f"{row[key]:.1f} ms" for key in times],
            format_bytes(row["saved_bytes"]),
            format_bytes(row["mesa8_saved_bytes"]),
        )
    return table


def counted(label: str, side: int, batch: int) -> records.Row:
    """Parameters, multiply-adds of one map, and saved bytes of `batch` maps for each policy."""
    with torch.device("meta"):
        layer, options = build(label, side)
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
        "options": options,
        "dim": DIM,
        "heads": HEADS,
        "parameters": sum(p.numel() for p in layer.parameters()),
        "macs": layer.flops(side, side),
        "count_batch": batch,
        "saved_bytes": saved["plain"],
        "mesa8_saved_bytes": saved["mesa8"],
    }


def timed(
    side: int, batch: int, rounds: int, device: str, dtype: torch.dtype | None
) -> dict[str, dict[str, float]]:
    """Median milliseconds of a forward without gradients and of a training step.

    Args:
        dtype: of autocast; None for float32.
    """
    torch.manual_seed(0)
    maps = torch.randn(batch, side, side, DIM, device=device)
    calls: dict[tuple[str, str], Callable[[], None]] = {}
    for label in LABELS:
        plain, coded = (
            nn.Sequential(nn.LayerNorm(DIM), build(label, side)[0]).to(device) for _ in range(2)
        )
        mesa_train.wrap(coded, "mesa8")
        calls[label, "forward_ms"] = _forward(plain, maps, dtype)
        calls[label, "train_ms"] = _train(plain, maps, dtype)
        calls[label, "mesa8_train_ms"] = _train(coded, maps, dtype)
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
    for (label, measure), values in times.items():
        quartiles = statistics.quantiles(values, n=4)
        medians.setdefault(label, {})[measure] = statistics.median(values)
        medians[label][f"{measure}_low"], medians[label][f"{measure}_high"] = (
            quartiles[0],
            quartiles[2],
        )
    return medians


def _forward(model: nn.Module, maps: Tensor, dtype: torch.dtype | None) -> Callable[[], None]:
    """A forward without gradients."""

    def call() -> None:
        with torch.no_grad(), autocasting(maps.device, dtype):
            model(maps)

    return call


def _train(model: nn.Module, maps: Tensor, dtype: torch.dtype | None) -> Callable[[], None]:
    """A forward and a backward."""
    leaf = maps.clone().requires_grad_()

    def call() -> None:
        with autocasting(maps.device, dtype):
            out = model(leaf)
        out.float().square().mean().backward()
        leaf.grad = None
        model.zero_grad()

    return call


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
