"""`mesa-train`: what a model keeps for its backward, from the command line.

compare puts methods side by side; profile shows where the bytes are. Tables go to stdout, progress
and errors to stderr; with --json stdout is JSON alone. What a command needs is imported when it
runs, so that --help is quick.
"""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from mesa_train.memory.load import Loaded

app = typer.Typer(
    name="mesa-train",
    help="See and compare what a model keeps for its backward.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFAULT_METHODS = "plain,mesa8,mesa4,mesa8-recompute,mesa4-recompute,checkpoint"


class DType(str, enum.Enum):
    """The arithmetic of the forward. Weights stay float32."""

    float32 = "float32"
    bf16 = "bf16"
    fp16 = "fp16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm name, hf:CONFIG_OR_PATH, torchvision:NAME or python:MODULE.FACTORY.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in the batch.")]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Height and width of the images; default: the model's own."),
]
Precision = Annotated[
    DType, typer.Option(help="float32, or autocast to bfloat16 or float16 (weights stay float32).")
]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; default: cuda if there is one, else cpu.")
]
Fake = Annotated[
    bool,
    typer.Option("--fake", help="Count on tensors without data: any size, in seconds, bytes only."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.callback()
def _group() -> None:
    """See and compare what a model keeps for its backward."""


@app.command()
def compare(
    model: Model,
    batch_size: BatchSize = 8,
    image_size: ImageSize = None,
    dtype: Precision = DType.bf16,
    methods: Annotated[
        str, typer.Option(help="Comma-separated: plain, checkpoint, any preset.")
    ] = DEFAULT_METHODS,
    time: Annotated[bool, typer.Option(help="Measure forward plus backward.")] = True,
    error: Annotated[bool, typer.Option(help="Measure the gradient against float32.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of every method.")] = 5,
    device: Device = None,
    fake: Fake = False,
    as_json: Json = False,
) -> None:
    """Methods side by side: bytes kept, gradient error, step time."""
    with _one_line_errors():
        from mesa_train.memory.compare import compare as measure
        from mesa_train.memory.methods import check_method

        names = [name.strip() for name in methods.split(",") if name.strip()]
        for name in names:
            check_method(name)
        loaded, where = _load(model, batch_size, image_size, device, fake)
        with _progress() as progress:
            rows = measure(
                loaded.model,
                loaded.inputs,
                names,
                autocast=_autocast(dtype),
                device=where if fake else None,
                fake=fake,
                error=error,
                time=time,
                rounds=rounds,
                progress=progress,
            )
        if as_json:
            setting = _setting(loaded, dtype, where, fake)
            _print_json({**setting, "rows": [row.to_dict() for row in rows]})
            return
        from mesa_train.memory import terminal

        _print(
            _title(loaded, dtype, where),
            terminal.comparison(rows),
            *terminal.notes_of(rows),
        )


@app.command()
def profile(
    model: Model,
    policy: Annotated[
        str, typer.Option(help="A preset, checkpoint, or a policy's YAML file.")
    ] = "mesa8",
    depth: Annotated[
        int | None, typer.Option(min=0, help="Levels of the module tree to show; default: all.")
    ] = None,
    batch_size: BatchSize = 8,
    image_size: ImageSize = None,
    dtype: Precision = DType.bf16,
    device: Device = None,
    fake: Fake = False,
    as_json: Json = False,
) -> None:
    """Where the bytes are, by operator and by module: plain against a policy."""
    with _one_line_errors():
        from mesa_train.memory.footprint import footprint
        from mesa_train.memory.methods import check_method
        from mesa_train.policy import Policy

        method: Policy | str = policy
        if policy.endswith((".yaml", ".yml")):
            method = Policy.from_yaml(policy)
        else:
            check_method(policy)
        loaded, where = _load(model, batch_size, image_size, device, fake)
        results = {}
        with _progress() as progress:
            for step, (label, wanted) in enumerate({"plain": "plain", policy: method}.items()):
                progress(label, step, 2)
                results[label] = footprint(
                    loaded.model,
                    loaded.inputs,
                    policy=wanted,
                    autocast=_autocast(dtype),
                    device=where if fake else None,
                    fake=fake,
                )
        plain, other = results["plain"], results[policy]
        if as_json:
            setting = _setting(loaded, dtype, where, fake)
            both = {"plain": plain.to_dict(), "with_policy": other.to_dict()}
            _print_json({**setting, "policy": policy, **both})
            return
        from mesa_train.memory import terminal

        label = policy if method is policy else "policy"
        _print(
            _title(loaded, dtype, where),
            terminal.by_operator(plain, other, label),
            "Modules with their submodules:",
            terminal.by_module(plain, other, label, depth),
            *plain.notes,
        )


def _load(
    name: str, batch_size: int, image_size: int | None, device: str | None, fake: bool
) -> tuple[Loaded, str]:
    """The model (on meta for --fake) and the device that it is measured on or counted for."""
    import torch

    from mesa_train.memory.load import load

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {where!r}")
    if where.startswith("cuda") and not torch.cuda.is_available() and not fake:
        raise ValueError(f"--device {where}: PyTorch sees no CUDA device here")
    with _quiet():
        loaded = load(
            name,
            batch_size=batch_size,
            image_size=image_size,
            device="meta" if fake else where,
        )
    return loaded, where


def _autocast(dtype: DType) -> torch.dtype | None:
    import torch

    return {DType.bf16: torch.bfloat16, DType.fp16: torch.float16}.get(dtype)


def _setting(loaded: Loaded, dtype: DType, device: str, fake: bool) -> dict[str, Any]:
    """What was measured, for JSON."""
    import torch

    return {
        "model": loaded.name,
        "inputs": loaded.shapes(),
        "dtype": dtype.value,
        "device": device,
        "fake": fake,
        "torch": torch.__version__,
    }


def _title(loaded: Loaded, dtype: DType, device: str) -> str:
    arithmetic = "float32" if dtype is DType.float32 else f"{dtype.value} autocast"
    shapes = ", ".join("x".join(map(str, shape)) for shape in loaded.shapes())
    return f"{loaded.name}  {shapes}  {arithmetic}  {device}"


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, gone when done; nothing at all where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What libraries print while they build a model goes to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """A wrong request ends in one line on stderr and exit code 2, not in a traceback."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        typer.echo(f"mesa-train: {lines[0] if lines else type(error).__name__}", err=True)
        raise typer.Exit(2) from None


def _print(*renderables: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for renderable in renderables:
        console.print(renderable)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))


if __name__ == "__main__":
    app()
