"""Benchmark of every operator against a copy of the bytes that it must move: a kernel's best time.

An operator must read each of its inputs and write each of its outputs once. The baseline is a copy
that reads and writes as many bytes in total, into allocated memory. The operator allocates its
output, as in training. Operator and copy take turns, and caches are flushed before each. `share` is
the copy's time over the operator's, the median over rounds of the ratio within one round. A share
of 1 means that the arithmetic costs nothing.

Two measures make the copy comparable:

- On the CPU, after the flush, operator and copy are each called once on a few rows of other
  tensors. A step calls each operator dozens of times. Without the first call, every operator call
  spends 40 to 60 us on loading dispatcher and code from memory, and every copy 14 us.
- If an input's rows are not adjacent in memory, the copy reads rows with the same layout. On one
  core this alone takes 1.8 times as long as reading as many contiguous bytes.

    python scripts/bench/ops.py                   shapes of vit_small at batch 16 on the CPU
    python scripts/bench/ops.py --device cuda     shapes of vit_base at batch 128
    python scripts/bench/ops.py --operators affine_encode,norm_backward --bits 4
    python scripts/bench/ops.py --dtype float32   for a processor without bfloat16

Rows go to docs/results/ops.jsonl. On a GPU the time is the device's own (events around each call),
and `host_us` is the time that a launch costs the processor. MESA_TRAIN_CPU_KERNELS=0 and
MESA_TRAIN_TRITON=0 measure the plain-torch reference instead.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor

from mesa_train import kernels
from mesa_train.kernels.triton import load as triton_load
from mesa_train.utils import records
from mesa_train.utils.formatting import format_table

REPOSITORY = Path(__file__).resolve().parents[2]
GROUP_SIZE = 128
# affine_encode_parts codes several operands in one pass; it exists on the CPU only.
OPERATORS = (*triton_load.OPERATORS, "affine_encode_parts")
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
# Tokens, width and hidden width of the measured model.
SHAPES = {"cpu": (16 * 197, 384, 1536), "cuda": (128 * 197, 768, 3072)}
# More than the last-level cache of a GPU, or of a process's cores.
FLUSH_BYTES = 128 * 2**20


class Case(NamedTuple):
    """One call.

    Attributes:
        operator: its name.
        variant: of the inputs.
        call: the call; it must write its results.
        reads: the tensors that it must read.
    """

    operator: str
    variant: str
    call: Callable[[], Any]
    reads: tuple[Tensor, ...]


# Rows of the small call before a measured call.
FEW = 16


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    operators: Annotated[str | None, typer.Option(help="Comma-separated; default: all.")] = None,
    bits: Annotated[
        str, typer.Option(help="Comma-separated, of 8, 6, 5, 4, 3, 2.")
    ] = "8,6,5,4,3,2",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=1)] = 31,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as torch chooses.")] = None,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = REPOSITORY
    / "docs/results/ops.jsonl",
) -> None:
    """Measure the operators and append a row for each."""
    if threads is not None:
        torch.set_num_threads(threads)
    if device not in SHAPES:
        raise SystemExit(f"bench_ops: unknown device {device!r}; choose from {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise SystemExit(f"bench_ops: unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench_ops: --device cuda, but PyTorch sees no CUDA device here")
    wanted = operators.split(",") if operators else offered(device)
    if unknown := sorted(set(wanted) - set(OPERATORS)):
        raise SystemExit(
            f"bench_ops: unknown operators {', '.join(unknown)}; choose from {', '.join(OPERATORS)}"
        )
    kernels.load()
    common = {
        "rounds": rounds,
        "group_size": GROUP_SIZE,
        "dtype": dtype,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "command": shlex.join(["python", f"scripts/bench/{Path(__file__).name}", *sys.argv[1:]]),
        **records.provenance(device),
    }
    timer = on_gpu if device == "cuda" else on_cpu
    rows = []
    widths = [int(b) for b in bits.split(",")]
    few = cases(torch.device(device), widths, FEW, DTYPES[dtype])
    many = cases(torch.device(device), widths, SHAPES[device][0], DTYPES[dtype])
    for case, small in zip(many, few, strict=True):
        if case.operator in wanted:
            body = {"backend": backend(case.operator, device)}
            rows.append({**measure(case, small, rounds, timer), **body, **common})
            records.append(out, rows[-1])
    console = Console()
    console.print(as_text(rows), highlight=False, soft_wrap=True)
    console.print(f"rows in {os.path.relpath(out)}", highlight=False, soft_wrap=True)


def offered(device: str) -> tuple[str, ...]:
    """The operators that a kind of device uses."""
    if device == "cpu":
        return tuple(o for o in OPERATORS if o != "activation_pair_sum")
    return tuple(triton_load.OPERATORS)


def backend(operator: str, device: str) -> str:
    """The body of an operator that runs on a kind of device."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not has_kernel(f"mesa_train::{operator}", device.upper()):
        return "reference"
    if device == "cpu":
        return "c++"
    current = torch.device(device, torch.accelerator.current_device_index())
    return "reference" if triton_load._obstacle(current) else "triton"


def cases(
    device: torch.device, bits: list[int], tokens: int, narrow: torch.dtype
) -> Iterator[Case]:
    """All calls, on the shapes of a ViT whose matmuls compute in `narrow`."""
    ops = torch.ops.mesa_train
    _, width, hidden = SHAPES[device.type]
    torch.manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = narrow) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, grad = normal(tokens, hidden), normal(tokens, hidden)
    qkv = normal(tokens, 3 * width)
    stream, upstream = normal(tokens, width, dtype=torch.float32), normal(tokens, width)
    mean, rstd = torch.zeros(tokens, device=device), torch.ones(tokens, device=device)
    weight, bias = torch.ones(width, device=device), torch.zeros(width, device=device)
    for b in bits:
        yield from encode_cases(b, x, qkv, stream, (mean, rstd), (weight, bias))
        coded = ops.affine_encode.default(x, b, GROUP_SIZE, False, 0)
        x_hat = ops.affine_encode.default(stream, b, GROUP_SIZE, False, 0)
        for dither in (None, 0) if b < 8 else (None,):
            how = f"{b} bits" if dither is None else f"{b} bits, dither"
            yield Case(
                "affine_decode",
                f"hidden, {how}",
                partial(ops.affine_decode.default, *coded, b, hidden, x.dtype, None, None, dither),
                coded,
            )
            affine = weight, bias, dither
            yield Case(
                "affine_decode",
                f"norm's output, {how}",
                partial(ops.affine_decode.default, *x_hat, b, width, x.dtype, *affine),
                x_hat,
            )
            args = upstream, *x_hat, rstd, weight, b, True, upstream.dtype, dither
            yield Case(
                "norm_backward",
                f"layer norm, {how}",
                partial(ops.norm_backward.default, *args),
                (upstream, *x_hat, rstd),
            )
        yield Case(
            "activation_decode",
            f"gelu, {b} bits",
            partial(ops.activation_decode.default, *coded, b, hidden, x.dtype, "gelu"),
            coded,
        )
        yield Case(
            "activation_backward",
            f"gelu, {b} bits",
            partial(ops.activation_backward.default, grad, *coded, b, "gelu"),
            (grad, *coded),
        )
        yield Case(
            "activation_pair",
            f"gelu, {b} bits",
            partial(ops.activation_pair.default, grad, *coded, b, "gelu"),
            (grad, *coded),
        )
        yield Case(
            "activation_pair_sum",
            f"gelu, {b} bits",
            partial(ops.activation_pair_sum.default, grad, *coded, b, "gelu"),
            (grad, *coded),
        )
        yield from softmax_cases(b, normal(tokens * (width // 64), 197))
    yield Case(
        "scale_backward",
        "layer scale",
        partial(ops.scale_backward.default, stream, weight, narrow),
        (stream,),
    )
    yield from mask_cases(x, grad)


def softmax_cases(b: int, scores: Tensor) -> Iterator[Case]:
    """The calls on attention weights, in `b` bits."""
    ops = torch.ops.mesa_train
    code = b, GROUP_SIZE, False, 0
    coded = ops.affine_encode.default(scores.softmax(1), *code)
    yield Case(
        "softmax_encode",
        f"attention's weights, {b} bits",
        partial(ops.softmax_encode.default, scores, scores.dtype, *code),
        (scores,),
    )
    for dither in (None, 0) if b < 8 else (None,):
        how = f"{b} bits" if dither is None else f"{b} bits, dither"
        yield Case(
            "softmax_backward",
            f"attention's weights, {how}",
            partial(ops.softmax_backward.default, scores, *coded, b, dither),
            (scores, *coded),
        )
        args = b, scores.shape[1], scores.dtype, None, None, dither
        yield Case(
            "affine_decode",
            f"attention's weights, {how}",
            partial(ops.affine_decode.default, *coded, *args),
            coded,
        )


def encode_cases(
    b: int,
    x: Tensor,
    qkv: Tensor,
    stream: Tensor,
    statistics: tuple[Tensor, Tensor],
    parameters: tuple[Tensor, Tensor],
) -> Iterator[Case]:
    """The calls that produce codes of `b` bits."""
    ops = torch.ops.mesa_train
    (mean, rstd), (weight, bias) = statistics, parameters
    for stochastic in (False, True):
        how = f"{b} bits, {'stochastic' if stochastic else 'nearest'}"
        code = b, GROUP_SIZE, stochastic, 0
        for name, part in (("hidden", x), ("v in packed qkv", qkv[:, -len(weight) :])):
            yield Case(
                "affine_encode",
                f"{name}, {how}",
                partial(ops.affine_encode.default, part, *code),
                (part,),
            )
        yield Case(
            "affine_encode_parts",
            f"q, k and v in packed qkv, {how}",
            partial(ops.affine_encode_parts.default, qkv, 3, *code),
            (qkv,),
        )
        yield Case(
            "normalized_encode",
            f"float32, {how}",
            partial(ops.normalized_encode.default, stream, mean, rstd, *code),
            (stream, mean, rstd),
        )
        yield Case(
            "norm_encode",
            f"layer norm, {how}",
            partial(ops.norm_encode.default, stream, weight, bias, 1e-6, True, stream.dtype, *code),
            (stream,),
        )
        yield Case(
            "activation_encode",
            f"gelu, {how}",
            partial(ops.activation_encode.default, x, "gelu", *code),
            (x,),
        )


def mask_cases(x: Tensor, grad: Tensor) -> Iterator[Case]:
    """The calls on one bit an element."""
    ops = torch.ops.mesa_train
    mask = x > 0
    packed = ops.bitmask_encode.default(mask)
    yield Case("bitmask_encode", "bool", partial(ops.bitmask_encode.default, mask), (mask,))
    yield Case("bitmask_positive", "hidden", partial(ops.bitmask_positive.default, x), (x,))
    yield Case(
        "bitmask_apply",
        "hidden",
        partial(ops.bitmask_apply.default, grad, packed, 2.0),
        (grad, packed),
    )


# A measured call, and a call on a few rows that precedes it.
Calls = tuple[Callable[[], Any], Callable[[], Any]]
# From (operator, copy, rounds) to microseconds of each in every round, and of a launch on a GPU.
Timer = Callable[[Calls, Calls, int], tuple[list[float], list[float], Any]]


def on_cpu(operator: Calls, copy: Calls, rounds: int) -> tuple[list[float], list[float], None]:
    """Wall-clock times of operator and copy in turns."""
    flush = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):  # the first one warms up
        for series, (run, on_few_rows) in zip(times, (operator, copy), strict=True):
            flush.add_(1)
            on_few_rows()
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if number:
                series.append(elapsed * 1e6)
    return *times, None


def on_gpu(operator: Calls, copying: Calls, rounds: int) -> tuple[list[float], list[float], float]:
    """Times between events of operator and copy in turns, and the host's time per launch."""
    call, copy = operator[0], copying[0]
    flush = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")
    call(), copy()
    marks = []
    for _ in range(rounds):
        for run in (call, copy):
            # The flush keeps the device busy while the host prepares the next call.
            flush.add_(1)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            marks.append((start, end))
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) * 1e3 for start, end in marks]
    launches = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        launches.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return times[::2], times[1::2], statistics.median(launches)


def copying(case: Case, total_bytes: int) -> Callable[[], Any]:
    """A copy of total_bytes / 2 bytes, from rows with the layout of the operator's input."""
    x = case.reads[0]
    if x.is_contiguous():
        source = torch.ones(total_bytes // 2, dtype=torch.uint8, device=x.device)
    else:
        rows = total_bytes // 2 // (x.shape[1] * x.element_size())
        storage = torch.ones(rows, x.stride(0), dtype=x.dtype, device=x.device)
        source = storage[:, : x.shape[1]]
    target = torch.zeros(source.shape, dtype=source.dtype, device=x.device)
    return partial(target.copy_, source)


def measure(case: Case, small: Case, rounds: int, timer: Timer) -> records.Row:
    """The row of one call. `small` is the same call on a few rows."""
    result = case.call()
    writes = (result,) if isinstance(result, Tensor) else result
    total_bytes = sum([t.numel() * t.element_size() for t in (*case.reads, *writes)])
    copies_of = copying(case, total_bytes), copying(small, total_bytes * FEW // len(case.reads[0]))
    times, copies, host = timer((case.call, small.call), copies_of, rounds)
    shares = [copy_us / operator_us for operator_us, copy_us in zip(times, copies, strict=True)]
    low, _, high = statistics.quantiles(shares, n=4) if rounds > 1 else shares * 3
    row = {
        "operator": case.operator,
        "variant": case.variant,
        "moved_bytes": total_bytes,
        "time_us": statistics.median(times),
        "copy_us": statistics.median(copies),
        "bytes_per_s": total_bytes / statistics.median(times) * 1e6,
        "copy_bytes_per_s": total_bytes / statistics.median(copies) * 1e6,
        "share": statistics.median(shares),
        "share_quartiles": [low, high],
    }
    return row if host is None else {**row, "host_us": host}


def as_text(rows: list[records.Row]) -> str:
    """The rows as a table for a terminal."""
    head = ["operator", "variant", "time", "copy", "GB/s", "share of copy", "quartiles", "host"]
    return format_table(
        head,
        [
            [
                row["operator"],
                row["variant"],
                f"{row['time_us']:.0f} us",
                f"{row['copy_us']:.0f} us",
                f"{row['bytes_per_s'] / 1e9:.1f}",
                f"{row['share']:.0%}",
                "{:.0%} to {:.0%}".format(*row["share_quartiles"]),
                f"{row['host_us']:.0f} us" if "host_us" in row else "",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
