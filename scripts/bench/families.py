"""Benchmark of model families: saved bytes, plain against presets, and the gradient error.

One row for each model and method goes to docs/results/families.jsonl. The models have random
weights, drop path off and bf16 autocast.

    python scripts/bench/families.py
    python scripts/bench/families.py --models vit_tiny_patch16_224,hf:dinov2 --batch-size 2
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor, nn

from mesa_train.loading.model import load
from mesa_train.measure.footprint import footprint
from mesa_train.measure.runner import StepRunner
from mesa_train.measure.step import default_loss, device_of, relative_error
from mesa_train.methods.apply import METHODS, PLAIN, check_method
from mesa_train.methods.checkpointing import NoBlocks
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/families.jsonl"

MODELS = (
    "vit_tiny_patch16_224,deit3_small_patch16_224,beit_base_patch16_224,eva02_tiny_patch14_224,"
    "swin_tiny_patch4_window7_224,swinv2_tiny_window8_256,pvt_v2_b0,twins_svt_small,cait_xxs24_224,"
    "xcit_nano_12_p16_224,mvitv2_tiny,maxvit_rmlp_pico_rw_256,volo_d1_224,hiera_tiny_224,"
    "tiny_vit_5m_224,convnext_atto,resnet50,hf:vit,hf:swin,hf:beit,hf:deit,"
    "torchvision:vit_b_16,torchvision:swin_t,torchvision:maxvit_t"
)


def main(
    models: Annotated[
        str, typer.Option(help="Comma-separated, as for mesa-train compare.")
    ] = MODELS,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "plain,mesa8,mesa4",
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Measure every model with every method."""
    for name in track([m.strip() for m in models.split(",")], description="families"):
        torch.manual_seed(0)
        try:
            loaded = load(name, batch_size=batch_size)
            for module in loaded.model.modules():
                for attribute in ("drop_prob", "p"):
                    if isinstance(getattr(module, attribute, None), float):
                        setattr(module, attribute, 0.0)
            measured = compare(
                loaded.model.train(),
                loaded.inputs,
                methods.split(","),
                autocast=torch.bfloat16,
                time=False,
            )
        except ValueError as error:
            raise SystemExit(f"bench_families: {name}: {error}") from None
        common = {"model": name, "batch_size": batch_size, "dtype": "bf16 autocast"}
        origin = records.provenance()
        records.append(out, *[{**common, **row.to_dict(), **origin} for row in measured])


@dataclasses.dataclass(frozen=True)
class Row:
    """One method's measurements. None: not requested or not possible (see `notes`).

    Attributes:
        method: its name.
        saved_bytes: saved for the backward, each storage once.
        saved_ratio: plain's saved bytes over this method's.
        gradient_error: relative L2 distance from the plain float32 gradient over all parameters.
        time_ms: median milliseconds of forward plus backward.
        time_ratio: median over the rounds of this method's time over plain's.
        notes: reasons for missing values.
    """

    method: str
    saved_bytes: int | None
    saved_ratio: float | None = None
    gradient_error: float | None = None
    time_ms: float | None = None
    time_ratio: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return dataclasses.asdict(self)


def compare(
    model: nn.Module,
    inputs: Any,
    methods: Sequence[str] = METHODS,
    *,
    autocast: torch.dtype | None = None,
    fake: bool = False,
    device: str | torch.device | None = None,
    error: bool = True,
    time: bool = True,
    rounds: int = 5,
    loss: Callable[[Any], Tensor] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """Measure `methods` on `model(inputs)`, one Row for each in their order.

    The model stays unchanged.

    Args:
        inputs, autocast, fake, device: as for `footprint`. Fake tensors, and a model on the meta
            device, give only bytes.
        methods: names of methods.
        error: measure the gradient error.
        time: measure the time.
        rounds: timed runs of every method, after one warm-up run.
        loss: from the output to a scalar, for the real steps; default: `default_loss`.
        progress: called before every step with (description, number from 0, total), and once at the
            end.
    Raises:
        ValueError: a method is unknown, there is no method, rounds < 1, or an error of `footprint`.
    """
    if not methods:
        raise ValueError(f"compare() needs a method; choose from {', '.join(METHODS)}, or a preset")
    for method in methods:
        check_method(method)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    real = not (fake or device_of(model).type == "meta")
    steps = _Steps(progress, len(methods), error and real, time and real, rounds)
    count = functools.partial(footprint, model, inputs, autocast=autocast, fake=fake, device=device)
    steps.next(f"bytes: {PLAIN}")
    plain = count(policy=PLAIN)
    results: dict[str, Row] = {}
    for method in methods:
        steps.next(f"bytes: {method}")
        try:
            counted = plain if method == PLAIN else count(policy=method)
        except NoBlocks as reason:
            results[method] = Row(method, None, notes=(str(reason),))
            continue
        ratio = plain.saved_bytes / counted.saved_bytes if counted.saved_bytes else None
        results[method] = Row(method, counted.saved_bytes, ratio, notes=counted.notes)
    run = StepRunner(model, inputs, autocast, loss or default_loss)
    usable = [method for method, row in results.items() if row.saved_bytes is not None]
    if error and real:
        steps.next("gradient: float32")
        reference = run.reference()
        for method in usable:
            steps.next(f"gradient: {method}")
            distance = relative_error(run.gradients(method), reference)
            results[method] = dataclasses.replace(results[method], gradient_error=distance)
    if time and real:
        timed = usable if PLAIN in usable else [PLAIN, *usable]
        times = dict(zip(timed, run.times(timed, rounds, steps.next), strict=True))
        for method in usable:
            results[method] = dataclasses.replace(
                results[method],
                time_ms=1e3 * statistics.median(times[method]),
                time_ratio=statistics.median(
                    seconds / plain
                    for seconds, plain in zip(times[method], times[PLAIN], strict=True)
                ),
            )
    steps.finish()
    return [results[method] for method in methods]


class _Steps:
    """Counts the steps for `progress`."""

    def __init__(
        self,
        progress: Callable[[str, int, int], None] | None,
        methods: int,
        error: bool,
        time: bool,
        rounds: int,
    ) -> None:
        self.progress = progress
        self.total = methods + 1 + error * (methods + 1) + time * (rounds + 1)
        self.done = 0

    def next(self, description: str) -> None:
        """Report the next step."""
        if self.progress is not None:
            self.progress(description, self.done, self.total)
        self.done += 1

    def finish(self) -> None:
        """Report the end."""
        if self.progress is not None:
            self.progress("done", self.total, self.total)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
