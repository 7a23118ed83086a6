"""Common parts of the commands: arguments, loading, output, and errors of one line."""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from mesa_train.loading.model import Loaded


class DType(str, enum.Enum):
    """Arithmetic of the forward. Weights stay float32."""

    auto = "auto"
    float32 = "float32"
    bf16 = "bf16"
    fp16 = "fp16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm name, hf:CONFIG_OR_PATH, torchvision:NAME, python:MODULE.FACTORY or "
        "python:FILE.py:FACTORY.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in the batch.")]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Height and width of the images; default: the model's own."),
]
Precision = Annotated[
    DType,
    typer.Option(
        help="float32, or autocast to bfloat16 or float16; weights stay float32. auto: bfloat16 "
        "if the device computes in it, else float32 on a CPU, float16 on a GPU."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; default: cuda if there is one, else cpu.")
]
Fake = Annotated[
    bool,
    typer.Option("--fake", help="Count bytes on fake tensors: any model size, in seconds."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def device_name(device: str | None, fake: bool) -> str:
    """The device to measure on, or to count for.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available() and not fake:
        raise ValueError(f"--device {name}: PyTorch sees no CUDA device here")
    return name


def loading(
    name: str,
    batch_size: int,
    image_size: int | None,
    device: str | None,
    fake: bool,
    warn: bool = True,
) -> tuple[Loaded, str]:
    """Load the model, on meta for --fake.

    Args:
        name: the MODEL string.
        batch_size: number of images.
        image_size: height and width of the images; None for the model's own.
        device: cpu or cuda; None for cuda if there is one, else cpu.
        fake: count on fake tensors.
        warn: write to stderr if the model has another number of inputs than `batch_size`.

    Returns:
        (the model with inputs, the device to measure on or to count for).
    """
    from mesa_train.loading.model import load

    target = device_name(device, fake)
    with quiet():
        loaded = load(
            name,
            batch_size=batch_size,
            image_size=image_size,
            device="meta" if fake else target,
        )
    if warn and loaded.batch != batch_size:
        message = (
            f"{name} makes {loaded.batch} inputs itself, so --batch-size {batch_size} has no effect"
        )
        typer.echo(f"mesa-train: {message}; give the factory a batch_size argument", err=True)
    return loaded, target


def resolved(loaded: Loaded, dtype: DType, target: str, fake: bool) -> DType:
    """Replace `auto` by the dtype for a device.

    Weights in half precision need no autocast. If `auto` is not bf16, or if the device only
    emulates the given dtype, the function writes a line to stderr.
    """
    from mesa_train.utils.precision import choose

    if dtype is DType.auto and _weights(loaded) not in ("float32", "mixed"):
        return DType.float32
    requested = {DType.float32: "no"}.get(dtype, dtype.value)
    choice = choose(requested, target)
    if (choice.emulated and not fake) or (dtype is DType.auto and choice.name != "bf16"):
        typer.echo(f"mesa-train: {choice.line}", err=True)
    return {"no": DType.float32, "bf16": DType.bf16, "fp16": DType.fp16}[choice.name]


def check_precision(loaded: Loaded, dtype: DType, target: str, fake: bool) -> None:
    """Check that autocast and the model's weights are not two different half precisions on a CPU.

    PyTorch's norms raise an error for two half precisions on a CPU, which names neither dtype.

    Raises:
        ValueError: the dtypes are two different half precisions; the message names both.
    """
    autocast = autocast_of(dtype)
    weights = _weights(loaded)
    if fake or autocast is None or not target.startswith("cpu") or weights in ("float32", "mixed"):
        return
    if weights != str(autocast).removeprefix("torch."):
        matching = "fp16" if weights == "float16" else "bf16"
        raise ValueError(
            f"{loaded.name} has {weights} weights; a CPU cannot run them with --dtype {dtype.value}; "
            f"choose {matching}, or float32 for no autocast"
        )


def _weights(loaded: Loaded) -> str:
    """The dtype of all of a model's weights, or "mixed"."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in loaded.model.parameters()}
    return dtypes.pop() if len(dtypes) == 1 else "mixed"


def autocast_of(dtype: DType) -> torch.dtype | None:
    """The dtype of autocast; None for float32."""
    import torch

    return {DType.bf16: torch.bfloat16, DType.fp16: torch.float16}.get(dtype)


def setting_of(loaded: Loaded, dtype: DType, device: str, fake: bool) -> dict[str, Any]:
    """Model, inputs, dtype and device of a measurement, for JSON."""
    import torch

    return {
        "model": loaded.name,
        "inputs": loaded.shapes(),
        "dtype": dtype.value,
        "weights": _weights(loaded),
        "device": device,
        "fake": fake,
        "torch": torch.__version__,
    }


def title_of(loaded: Loaded, dtype: DType, device: str) -> str:
    """The line above a table."""
    from mesa_train.utils.formatting import format_precision, format_shapes

    shapes, precision = (
        format_shapes(loaded.shapes()),
        format_precision(dtype.value, _weights(loaded)),
    )
    return f"{loaded.name}  {shapes}  {precision}  {device}"


def command_line() -> str:
    """The command line that the user typed, with the plain name of the program."""
    program = Path(sys.argv[0]).name
    if program in ("__main__.py", "cli.py"):
        return shlex.join(["python", "-m", "mesa_train.cli", *sys.argv[1:]])
    return shlex.join([program, *sys.argv[1:]])


def writable_folder(folder: Path, option: str) -> None:
    """Make a folder for results.

    Raises:
        ValueError: the folder cannot be made or written to; the message names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {folder}: cannot make a folder ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {folder}: the folder is not writable")


def writable_file(path: Path | None, option: str, ending: str) -> None:
    """Make the folder of a file for a result.

    Raises:
        ValueError: the folder cannot be made or written to, or the file has another ending than
            `ending`; the message names the option.
    """
    if path is None:
        return
    if path.suffix.lower() not in ending.split():
        raise ValueError(f"{option} {path}: the file name must end in {ending.split()[0]}")
    if path.is_dir():
        raise ValueError(f"{option} {path}: the path is a folder")
    writable_folder(path.parent, option)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr until the end; show nothing if stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda step, done, total: bar.update(
            task, description=step, completed=done, total=total
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send the output of libraries that build a model to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End a wrong request with one line on stderr and exit code 2, without a traceback."""
    # This logger writes a traceback if an operator refuses its arguments.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:  # A user's own model may raise any error.
        from mesa_train.utils.errors import one_line

        logging.getLogger("mesa_train").debug("the error in full", exc_info=True)
        typer.echo(f"mesa-train: {one_line(error)}", err=True)
        raise typer.Exit(2) from None


def show(*renderables: Any) -> None:
    """Print to stdout; leave out None."""
    from rich.console import Console

    console = Console(highlight=False)
    for renderable in renderables:
        if renderable is not None:
            console.print(renderable)


def console_width() -> int:
    """Characters in a line of the terminal."""
    from rich.console import Console

    return Console().width


def show_json(value: dict[str, Any]) -> None:
    """Print JSON alone."""
    typer.echo(json.dumps(value, indent=2))
