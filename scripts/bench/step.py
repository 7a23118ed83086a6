"""Benchmark of whole training steps of real models: time, saved bytes and gradient error.

All methods share one model, one batch and one process, and take turns: a round runs every method
once, in a rotating order. A method's time ratio is the median over rounds of its time over plain's
in the same round. A slow phase of the machine therefore slows all methods. The optimizer is AdamW
at learning rate 0: it does all of its work and does not change the weights.

    python scripts/bench/step.py                      rows go to docs/results/bench_step.jsonl
    python scripts/bench/step.py --quick              3 rounds, rows go to runs/bench_step.jsonl
    python scripts/bench/step.py --models deit3_small_patch16_224 --methods plain,mesa4
    python scripts/bench/step.py --dtype float32      for a processor without bfloat16
    python scripts/bench/step.py --rounds 0           bytes, peaks and errors without times
"""

from __future__ import annotations

import functools
import os
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from mesa_train import Policy, footprint
from mesa_train.loading.model import Loaded, load
from mesa_train.measure.peak import peak_of
from mesa_train.measure.step import Step, relative_error, tensors_in
from mesa_train.methods import approx_bp
from mesa_train.methods.apply import APPROX_BP, PLAIN, SAVE_ON_CPU
from mesa_train.methods.checkpointing import NoBlocks
from mesa_train.methods.spec import optimizer_bytes
from mesa_train.methods.variants import CHOICES, COMPILE, Variant, check_variant
from mesa_train.utils import records
from mesa_train.utils.formatting import format_bytes, format_table

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = "vit_small_patch16_224,deit3_small_patch16_224"
METHODS = (
    "plain,mesa8,mesa6,mesa4,mesa8-recompute,mesa4-recompute,checkpoint,save_on_cpu,approx-bp,"
    "compile,compile-budget-0.5,compile-fp8,compile:mesa8"
)
# Policies beside the presets, by name.
POLICIES = {"mesa8-fused": Policy(forward="fused")}
# Remarks on the time of a method.
REMARKS = {APPROX_BP: approx_bp.REMARK}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": None}

BUDGET_BYTES = 24 << 30


def main(
    models: Annotated[
        str, typer.Option(help="Comma-separated, each as for `mesa-train compare`.")
    ] = MODELS,
    methods: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join((*CHOICES, *POLICIES))}.")
    ] = METHODS,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    image_size: Annotated[int | None, typer.Option(min=1)] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=0, help="0: no times.")] = 11,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as torch chooses.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="3 rounds; rows go to runs.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON lines to append to.")] = None,
) -> None:
    """Measure every method on every model and append a row for each."""
    if threads is not None:
        torch.set_num_threads(threads)
    rounds = min(rounds, 3) if quick else rounds
    out = out or REPOSITORY / ("runs" if quick else "docs/results") / "bench_step.jsonl"
    console = Console()
    for name in models.split(","):
        try:
            if dtype not in DTYPES:
                raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
            selected = [PLAIN, *(m for m in methods.split(",") if m != PLAIN)]
            for method in selected:
                if method not in POLICIES:
                    check_variant(method)
            loaded = load(name, batch_size=batch_size, image_size=image_size, device=device)
        except (ValueError, ImportError) as error:
            raise SystemExit(f"bench_step: {error}") from None
        setting = {
            "model": name,
            "batch_size": batch_size,
            "shapes": loaded.shapes(),
            "dtype": dtype,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "rounds": rounds,
            "command": shlex.join(
                ["python", f"scripts/bench/{Path(__file__).name}", *sys.argv[1:]]
            ),
        }
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(
                name, total=3 * len(selected) + 1 + (rounds + 1 if rounds else 0) * len(selected)
            )
            measured = measure(
                loaded,
                batch_size,
                selected,
                DTYPES[dtype],
                rounds,
                functools.partial(progress.advance, task),
            )
        source = records.provenance(device)
        records.append(out, *({**setting, **row, **source} for row in measured))
        title = f"{name}, batch {batch_size}, {dtype}, {torch.get_num_threads()} threads"
        console.print(f"\n{title}\n{as_text(measured)}", highlight=False, soft_wrap=True)
    console.print(f"rows in {os.path.relpath(out)}", highlight=False, soft_wrap=True)


def measure(
    loaded: Loaded,
    batch_size: int,
    methods: list[str],
    autocast: torch.dtype | None,
    rounds: int,
    advance: Callable[[], None],
) -> list[records.Row]:
    """One row for each method; a reason instead of numbers if it does not apply to the model."""
    bench = Bench(loaded, autocast)
    reference = bench.gradients(None)
    advance()
    rows: dict[str, records.Row] = {}
    for method in methods:
        try:
            saved = bench.saved_bytes(method)
            advance()
            error = relative_error(bench.gradients(method), reference)
            advance()
        except NoBlocks as reason:
            rows[method] = {"method": method, "note": str(reason)}
            continue
        except RuntimeError as reason:
            # If the compiler raises an error, the method's row has the error.
            lines = str(reason).strip().splitlines()
            rows[method] = {"method": method, "note": f"{type(reason).__name__}: {lines[0]}"}
            continue
        rows[method] = {"method": method, "saved_bytes": saved, "gradient_error": error}
        if method in REMARKS:
            rows[method]["remark"] = REMARKS[method]
    usable = [method for method, row in rows.items() if "note" not in row]
    times_ms: dict[str, list[float]] = {method: [] for method in usable}
    for number in range(rounds + 1 if rounds else 0):  # the first one warms up
        turn = number % len(usable)
        for method in usable[turn:] + usable[:turn]:
            time_ms = bench.timed(method)
            advance()
            if number:
                times_ms[method].append(time_ms)
    for method in usable:
        rows[method]["peak_bytes"] = bench.peak_bytes(method)
        advance()
        saved = rows[method]["saved_bytes"]
        rows[method] |= {
            "saved_ratio": rows[PLAIN]["saved_bytes"] / saved,
            "largest_batch": largest_batch(bench.model, saved / batch_size),
        }
    if not rounds:
        return [rows[method] for method in methods]
    plain = times_ms[PLAIN]
    for method in usable:
        step_times = times_ms[method]
        ratios = [
            method_ms / plain_ms for method_ms, plain_ms in zip(step_times, plain, strict=True)
        ]
        rows[method] |= {
            "images_per_s": batch_size / statistics.median(step_times) * 1e3,
            "step_ms": statistics.median(step_times),
            "step_ms_quartiles": _quartiles(step_times),
            "step_ratio": statistics.median(ratios),
            "step_ratio_quartiles": _quartiles(ratios),
            "times_ms": [round(time_ms, 3) for time_ms in step_times],
        }
    return [rows[method] for method in methods]


def largest_batch(model: nn.Module, saved_per_image: float) -> int:
    """The largest batch whose saved bytes fit `BUDGET_BYTES` with the static bytes.

    Static bytes are float32 weights, gradients and AdamW's two moments. The workspace of single
    operators does not count.
    """
    states = 16 * sum(p.numel() for p in model.parameters())
    return max(0, int((BUDGET_BYTES - states) / saved_per_image))


class Bench:
    """One model, its optimizer and one batch, run with any method."""

    def __init__(self, loaded: Loaded, autocast: torch.dtype | None) -> None:
        self.model, self.autocast = loaded.model, autocast
        self.inputs = loaded.inputs
        self.device = next(self.model.parameters()).device
        self.step, self.exact = Step(self.device, autocast), Step(self.device, None)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self.variants: dict[str, Variant] = {}

    def variant(self, method: str) -> Variant:
        """The model prepared for `method`; prepared once."""
        if method not in self.variants:
            self.variants[method] = Variant(self.model, POLICIES.get(method, method))
        return self.variants[method]

    def saved_bytes(self, method: str) -> int:
        """Bytes saved for the backward. For save_on_cpu, bytes of the copies in CPU memory."""
        if method != SAVE_ON_CPU and not method.startswith(COMPILE):
            policy = POLICIES.get(method, method)
            counted = footprint(self.model, self.inputs, policy=policy, autocast=self.autocast)
            return counted.saved_bytes
        return self.variant(method).saved_bytes(lambda m: self.step.forward(m, self.inputs))

    def gradients(self, method: str | None) -> list[Tensor | None]:
        """Every parameter's gradient with `method`; None for plain float32, the reference."""
        with self.variant(method or PLAIN).active() as module:
            (self.step if method else self.exact).backward(module, self.inputs)
        gradients = [p.grad for p in self.model.parameters()]
        self.optimizer.zero_grad(set_to_none=True)
        return gradients

    def timed(self, method: str) -> float:
        """Milliseconds of one whole training step."""
        with self.variant(method).active() as module:
            return 1e3 * self.step.seconds(lambda: self._step(module))

    def peak_bytes(self, method: str) -> int:
        """Peak of allocated bytes in a step, with weights, optimizer states and inputs."""
        static_tensors = [*self.model.parameters(), *self.model.buffers(), *tensors_in(self.inputs)]
        with self.variant(method).active() as module:
            peak = peak_of(lambda: self._step(module), self.device)
        states = optimizer_bytes(self.optimizer)
        return peak.allocated_bytes + states + sum([t.nbytes for t in static_tensors])

    def _step(self, module: nn.Module) -> None:
        """One whole training step."""
        self.step.backward(module, self.inputs)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _quartiles(values: list[float]) -> list[float]:
    """First and third quartile; minimum and maximum of fewer than four values."""
    if len(values) < 4:
        return [min(values), max(values)]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def as_text(rows: list[records.Row]) -> str:
    """The rows as a table for a terminal."""
    head = [
        *("method", "saved", "less", "peak", "gradient error"),
        *("step", "step vs. plain", "quartiles"),
    ]
    lines = []
    for row in rows:
        if "note" in row:
            lines.append([row["method"], row["note"], *[""] * (len(head) - 2)])
            continue
        line = [
            row["method"],
            format_bytes(row["saved_bytes"]),
            f"{row['saved_ratio']:.2f}x",
            format_bytes(row["peak_bytes"]),
            f"{row['gradient_error']:.2%}",
        ]
        if "step_ms" in row:
            low, high = row["step_ratio_quartiles"]
            line += [f"{row['step_ms']:.0f} ms", f"{row['step_ratio']:.3f}"]
            line += [f"{low:.3f} to {high:.3f}"]
        lines.append([*line, *[""] * (len(head) - len(line))])
    return format_table(head, lines)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
