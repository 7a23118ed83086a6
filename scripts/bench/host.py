"""Benchmark of the host's share of a step: the time in which a fast GPU would wait for the CPU.

The tensors are so small that arithmetic takes little of the time. The methods take turns in one
process with one thread. A method's ratio is the median over rounds of its time over plain's.

Two launch paths are measured. "cpu" runs the C++ kernels. "gpu" runs the Python code that launches
the Triton kernels, with the launch itself left out. Its results are meaningless, and its time is
the host's time before the driver. Attention, norms and matmuls are PyTorch's CPU functions in both.

    python scripts/bench/host.py               rows go to docs/results/host.jsonl
    python scripts/bench/host.py --quick       3 rounds, rows go to runs/host.jsonl
    python scripts/bench/host.py --models vit --methods plain,mesa8 --paths cpu
"""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn

from mesa_train import compress, wrap
from mesa_train.engine import native
from mesa_train.engine.intercept import CompressionMode
from mesa_train.methods.checkpointing import checkpointed
from mesa_train.policy import PRESETS
from mesa_train.utils import records
from mesa_train.utils.formatting import format_table

REPOSITORY = Path(__file__).resolve().parents[2]
PATHS = ("cpu", "gpu")
# "compress": functional code without modules. "mesa8-python": mesa8 without native rows.
METHODS = ("plain", "checkpoint", *PRESETS, "mesa8-python", "compress")
IMAGES, SIDE, CLASSES = 2, 32, 10

Step = Callable[[], None]


def vit() -> nn.Module:
    """12 blocks of width 48, 65 tokens."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIDE, patch_size=4, embed_dim=48, depth=12, num_heads=3, num_classes=CLASSES
    )


def swin() -> nn.Module:
    """10 blocks in three stages, windows of 4 by 4."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=SIDE, patch_size=2, embed_dim=24, depths=(2, 2, 6), num_heads=(2, 4, 8),
        window_size=4, num_classes=CLASSES,
    )  # fmt: skip


MODELS = {"vit": vit, "swin": swin}


def functional_vit(parameters: list[dict[str, Tensor]], x: Tensor) -> Tensor:
    """12 blocks as functional code. `parameters`: of each block, by name. `x`: (B, N, C)."""
    for p in parameters:
        h = F.layer_norm(x, x.shape[-1:], p["norm1"], p["shift1"])
        qkv = F.linear(h, p["qkv"]).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)
        x = x + F.linear(h, p["out"])
        h = F.layer_norm(x, x.shape[-1:], p["norm2"], p["shift2"])
        x = x + F.linear(F.gelu(F.linear(h, p["up"])), p["down"])
    return x


def block_parameters(width: int = 48) -> dict[str, Tensor]:
    shapes = {
        **dict.fromkeys(("norm1", "shift1", "norm2", "shift2"), (width,)),
        "qkv": (3 * width, width),
        "out": (width, width),
        "up": (4 * width, width),
        "down": (width, 4 * width),
    }
    return {name: (torch.randn(s) * 0.1).requires_grad_() for name, s in shapes.items()}


def functional_step(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Step:
    """A step of `functional_vit` under a context."""
    torch.manual_seed(0)
    parameters = [block_parameters() for _ in range(12)]
    x = torch.randn(IMAGES, 65, 48, requires_grad=True)

    def step() -> None:
        with context():
            loss = functional_vit(parameters, x).square().mean()
        loss.backward()
        for block in parameters:
            for parameter in block.values():
                parameter.grad = None

    return step


def step_of(make: Callable[[], nn.Module], method: str) -> Step:
    """A step of a model with a method: forward, backward, gradients set to None."""
    torch.manual_seed(0)
    model = make().train()
    stack = contextlib.ExitStack()  # open as long as the step exists
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    if method == "checkpoint":
        stack.enter_context(checkpointed(model))
    elif method == "mesa8-python":
        wrap(model, "mesa8")

        def around() -> contextlib.AbstractContextManager[Any]:
            return native.python_rows(CompressionMode)

    elif method != "plain":
        wrap(model, method)
    images = torch.randn(IMAGES, 3, SIDE, SIDE)
    labels = torch.arange(IMAGES)

    def step() -> None:
        with around():
            F.cross_entropy(model(images), labels).backward()
        for parameter in model.parameters():
            parameter.grad = None

    step.stack = stack  # type: ignore[attr-defined]
    return step


def operators_of(step: Step) -> int:
    """The operators that a step calls through the dispatcher, forward and backward."""
    from torch.autograd.profiler import profile

    with profile(use_kineto=False) as prof:
        step()
    return sum(e.name.startswith(("aten::", "mesa_train::")) for e in prof.function_events)


def python_calls_of(step: Step) -> int:
    """The calls of Python functions in a step, forward and backward."""
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


@contextlib.contextmanager
def stubbed_gpu() -> Iterator[None]:
    """Run the Triton kernels' launchers for tensors on the CPU, without a launch.

    For a process of its own: the launchers stay registered.
    """
    import importlib

    from mesa_train import kernels
    from mesa_train.kernels import schemas
    from mesa_train.kernels.triton import load, tiles

    class Stub(dict[Any, Any]):
        """In the place of the cache of compiled kernels: every kernel is there and does nothing."""

        def get(self, key: Any, _default: Any = None) -> Any:
            hash(key)
            return _Kernel

    tiles._compiled = Stub()
    kernels.load()
    for name, file in load.OPERATORS.items():
        module = importlib.import_module(f"mesa_train.kernels.triton.{file}")
        schemas._library.impl(name, getattr(module, name), "CPU", allow_override=True)
    yield


class _Kernel:
    """A compiled kernel whose launch does nothing."""

    def __class_getitem__(cls, grid: tuple[int, ...]) -> Callable[..., None]:
        return cls.launch

    @staticmethod
    def launch(*arguments: Any) -> None:
        """Nothing."""


def measure(model: str, methods: list[str], path: str, rounds: int) -> list[records.Row]:
    """One row for each method.

    Args:
        model: a name of `MODELS`.
        methods: names of `METHODS`; "plain" is the first.
        path: "cpu" or "gpu".
        rounds: how often each method is timed.
    """
    torch.set_num_threads(1)
    steps = {m: step_of(MODELS[model], m) for m in methods if m != "compress"}
    bases = dict.fromkeys(steps, "plain")
    if "compress" in methods:
        steps["functional"] = functional_step(contextlib.nullcontext)
        steps["compress"] = functional_step(lambda: compress("mesa8"))
        bases |= {"functional": "functional", "compress": "functional"}
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {m: [] for m in steps}
    gc.collect()
    gc.disable()
    for number in range(rounds):
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
        gc.collect()
    gc.enable()
    rows = []
    for name, step in steps.items():
        ratios = [a / b for a, b in zip(times[name], times[bases[name]], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        rows.append(
            {
                "model": model if bases[name] == "plain" else "functional vit",
                "path": path,
                "method": name,
                "step_ms": statistics.median(times[name]) * 1e3,
                "ratio": statistics.median(ratios),
                "ratio_quartiles": [quartiles[0], quartiles[2]],
                "python_calls": python_calls_of(step),
                "operators": operators_of(step),
                "rounds": rounds,
            }
        )
    return rows


def main(
    models: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(MODELS)}.")
    ] = ",".join(MODELS),
    methods: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(METHODS)}.")
    ] = ",".join(METHODS),
    paths: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(PATHS)}.")] = ",".join(
        PATHS
    ),
    rounds: Annotated[int, typer.Option(min=1)] = 31,
    quick: Annotated[bool, typer.Option("--quick", help="3 rounds, rows aside.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON lines to append to.")] = None,
) -> None:
    """Measure the host's share of a step and append a row for each method."""
    for field, text, choices in (
        ("models", models, tuple(MODELS)),
        ("methods", methods, METHODS),
        ("paths", paths, PATHS),
    ):
        for word in text.split(","):
            if word not in choices:
                raise SystemExit(f"host: --{field} has {word!r}; choose from {', '.join(choices)}")
    rounds = min(rounds, 3) if quick else rounds
    out = out or REPOSITORY / ("runs" if quick else "docs/results") / "host.jsonl"
    wanted = ["plain", *(m for m in methods.split(",") if m != "plain")]
    if "," in paths:
        # The stubbed launchers stay registered, so each path has a process of its own.
        for path in paths.split(","):
            options = ["--models", models, "--methods", methods, "--paths", path]
            options += ["--rounds", str(rounds), "--out", str(out)]
            subprocess.run([sys.executable, __file__, *options], check=True)
        return
    console = Console()
    with stubbed_gpu() if paths == "gpu" else contextlib.nullcontext():
        for model in models.split(","):
            rows = measure(model, wanted, paths, rounds)
            command = shlex.join(["python", f"scripts/bench/{Path(__file__).name}", *sys.argv[1:]])
            source = records.provenance("cpu")
            records.append(out, *({**row, "command": command, **source} for row in rows))
            title = f"{model}, {IMAGES} images, launch path {paths}, one thread"
            console.print(f"\n{title}\n{as_text(rows)}", highlight=False, soft_wrap=True)
    console.print(f"rows in {os.path.relpath(out)}", highlight=False, soft_wrap=True)


def as_text(rows: list[records.Row]) -> str:
    """The rows as a table for the terminal."""
    head = ["method", "step", "vs. plain (quartiles)", "Python calls", "operators"]
    cells = [
        [
            row["method"],
            f"{row['step_ms']:.1f} ms",
            "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["ratio_quartiles"]),
            f"{row['python_calls']:,}",
            f"{row['operators']:,}",
        ]
        for row in rows
    ]
    return format_table(head, cells)


if __name__ == "__main__":
    typer.run(main)
