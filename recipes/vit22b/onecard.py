"""Training of a model of 22 billion parameters on one card, from random weights or your own.

    python recipes/vit22b/onecard.py nf4 --model vit_22b      # 24 GB: 4-bit weights, LoRA
    python recipes/vit22b/onecard.py lion --model vit_22b     # 80 GB: every parameter, 8-bit moment
    python recipes/vit22b/onecard.py factored --model vit_22b # 80 GB: every parameter, Adafactor

The script first prints the expected memory by component, and stops if the card has less. Then it
trains a few steps on images in the model's resolution. At the end it prints the peak, images/s, and
the share of the card's peak arithmetic that the model itself needs (mfu). scripts/bench/gpu_22b.sh
runs all three methods.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

import mesa_train.models  # noqa: F401  registers them with timm
from mesa_train.models.vit22b.model import SIZES, sigmoid_loss
from mesa_train.training import loop
from mesa_train.training.config_schema import POLICY, SHARE, OneOf
from mesa_train.training.data import packaged as data
from mesa_train.training.optim.optimizer_in_backward import METHODS as IN_BACKWARD
from mesa_train.training.optim.optimizer_in_backward import InBackward
from mesa_train.training.progress import Every
from mesa_train.training.vit22b import estimates
from mesa_train.training.vit22b import loop as sharded_loop
from mesa_train.training.vit22b import qlora as nf4_lora
from mesa_train.training.vit22b.averaging import AveragedWeights
from mesa_train.training.vit22b.backend import check_precision, install
from mesa_train.training.vit22b.checkpoint import CheckpointError, check_export, load_export
from mesa_train.training.vit22b.config import CHECKPOINTING, ConfigError
from mesa_train.training.vit22b.dry_run import method_of
from mesa_train.training.vit22b.schedule import groups
from mesa_train.utils import records
from mesa_train.utils.formatting import format_bytes

METHODS = ("nf4", *IN_BACKWARD)
Batches = Iterator[tuple[Any, Any]]
RANDOM = "random"


def main(
    method: Annotated[str, typer.Argument(help="nf4, lion or factored.")],
    model: Annotated[
        str, typer.Option(help="A model of mesa_train.models.vit22b.")
    ] = "vit_22b_tiny",
    weights: Annotated[Path | None, typer.Option(help="Safetensors file or folder.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels.")] = 224,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 8,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 5,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    policy: Annotated[str, typer.Option(help="plain, or a preset of mesa_train.")] = "mesa8",
    checkpointing: Annotated[str, typer.Option(help="none, block or coded.")] = "coded",
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    ema: Annotated[float, typer.Option(help="Decay of averaged weights; 0: none.")] = 0.0,
    images: Annotated[
        str, typer.Option(help="mnist5k, digits, or random: noise of 3 channels, 1,000 classes.")
    ] = "mnist5k",
    peak_tflops: Annotated[
        float | None, typer.Option(help="Of the card in bfloat16; default: by its name, if known.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Results.")] = Path("runs/vit22b/onecard"),
) -> None:
    """Train a few steps."""
    try:
        check(method, model, policy, checkpointing, images)
        SHARE("ema", ema)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = (3, 1000) if images == RANDOM else (1, 10)
        kept = method_of(policy, checkpointing)
        found = estimates.one_card(model, method, image_size, batch_size, kept, rank)
        predicted = estimates.components(found)
        if ema:
            predicted["average"] = average_bytes(method, model, image_size, shape, rank)
        print("expected:", ", ".join(f"{k} {format_bytes(v)}" for k, v in predicted.items()))
        check_room(sum(predicted.values()), batch_size, device)
        net = build(method, model, image_size, shape, weights, device, rank)
        net.train().set_grad_checkpointing(checkpointing != "none")
        install(net, policy, checkpointing)
        drawn = batches(images, batch_size, image_size, device)
        run = OneCardRun(net, method, drawn, steps, lr, device, ema)
        results = train(run)
        if run.average is not None:
            save_average(run.average, out)
    except torch.OutOfMemoryError:
        taken = format_bytes(torch.cuda.max_memory_allocated())
        raise SystemExit(
            f"error: out of memory at {taken}, where {format_bytes(sum(predicted.values()))} were "
            f"expected; take fewer images than {batch_size}"
        ) from None
    except (ConfigError, CheckpointError, ValueError, ImportError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    # Drawing and resizing images is not part of the method.
    seconds = [(r.step_ms - r.wait_ms) / 1e3 for r in results]
    rate = batch_size / sorted(seconds)[len(seconds) // 2]
    row: dict[str, Any] = {
        "method": method,
        "model": model,
        "image_size": image_size,
        "batch_size": batch_size,
        "policy": policy,
        "checkpointing": checkpointing,
        "losses": [r.loss for r in results],
        "images_per_s": rate,
        "predicted_bytes": predicted,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "images": images,
        "seconds": [round(s, 3) for s in seconds],
        "command": shlex.join(["python", "recipes/vit22b/onecard.py", *sys.argv[1:]]),
        **records.provenance(device),
    }
    if peak_tflops is None and device == "cuda":
        peak_tflops = sharded_loop.peak_tflops_of(torch.cuda.get_device_name())
    if peak_tflops:
        flops = rate * sharded_loop.model_flops(model, image_size)
        row["mfu"] = flops / (peak_tflops * 1e12)
    records.append(out / "results.jsonl", row)
    print(json.dumps(row, indent=1))


def check(method: str, model: str, policy: str, checkpointing: str, images: str) -> None:
    """Raise ValueError or ConfigError for arguments that cannot run, before memory is used."""
    OneOf(METHODS)("method", method)
    OneOf(SIZES)("model", model)
    POLICY("policy", policy)
    OneOf(CHECKPOINTING)("checkpointing", checkpointing)
    OneOf((*data.BUILTIN, RANDOM))("images", images)
    if checkpointing == "coded" and policy == "plain":
        raise ValueError("checkpointing=coded needs a policy other than plain")
    check_precision("pure_bf16")


def check_room(expected: int, batch: int, device: str) -> None:
    """Raise ValueError if the card has less memory than expected."""
    if device != "cuda":
        return
    free, _ = torch.cuda.mem_get_info()
    if expected > free:
        raise ValueError(
            f"{format_bytes(expected)} are expected, the card has {format_bytes(free)} free; take "
            f"fewer images than {batch}, or nf4"
        )


def build(
    method: str,
    name: str,
    size: int,
    shape: tuple[int, int],
    weights: Path | None,
    device: str,
    rank: int,
) -> Any:
    """Build the model on the device, in 4 bits or bfloat16.

    Args:
        method: "nf4", "lion" or "factored".
        name: of the model.
        size: of the images in pixels.
        shape: (channels, classes).
        weights: file or folder; None for random weights, which the device draws.
        device: of the model.
        rank: of nf4's adapters.
    """
    channels, classes = shape
    with torch.device("meta"):
        net: Any = timm.create_model(
            name, img_size=size, in_chans=channels, num_classes=classes, dtype=torch.bfloat16
        )
    drawn = nf4_lora.random_weights(0, device)
    if method == "nf4":
        return nf4_lora.quantised(
            net, nf4_lora.reader(weights) if weights else drawn, device, rank=rank
        )
    if weights:
        check_export(weights, net)
    net.to_empty(device=device)
    if weights:
        load_export(weights, net)
        return net
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            parameter.copy_(drawn(key, parameter.shape))
    return net


def batches(images: str, batch: int, size: int, device: str) -> Batches:
    """Yield (pixels, labels) endlessly, in the model's resolution, on the device."""
    if images == RANDOM:
        stream = torch.Generator(device).manual_seed(0)
        made: dict[str, Any] = {"device": device, "generator": stream}
        while True:
            pixels = torch.randn((batch, 3, size, size), dtype=torch.bfloat16, **made)
            yield pixels, torch.randint(1000, (batch,), **made)
    found = data.load(images)
    epoch = 0
    while True:
        for pixels, labels in data.train_batches(found, batch, seed=0, epoch=epoch):
            pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear")
            yield pixels.to(device, torch.bfloat16), labels.to(device)
        epoch += 1


class OneCardRun(loop.TrainingRun):
    """A model on one card. Its optimizer steps in the backward, except with nf4.

    Args:
        net: the model, in training.
        method: "nf4", "lion" or "factored".
        drawn: batches without end, on the device.
        steps: optimizer steps.
        lr: learning rate.
        device: "cuda" or "cpu".
        ema: decay of the averaged weights; 0: none.

    Attributes:
        average: of the trained parameters, in float32 on their device; None without `ema`.
    """

    def __init__(
        self, net: Any, method: str, drawn: Batches, steps: int, lr: float, device: str, ema: float
    ) -> None:
        parameters = groups(net)
        self.net, self.drawn, self.device, self.rate = net, drawn, device, lr
        self.in_backward = InBackward(parameters, lr, method) if method in IN_BACKWARD else None
        self.optimizer = None if self.in_backward else torch.optim.AdamW(parameters, lr=lr)
        self.cadence, self.steps = loop.Cadence(steps, steps), 0
        self.average = AveragedWeights(net, ema) if ema else None

    @property
    def done(self) -> int:
        """Optimizer steps done."""
        return self.steps

    @property
    def lr(self) -> float:
        """The learning rate, which is constant."""
        return self.rate

    def batches(self) -> Batches:
        """Batches without end."""
        return self.drawn

    def step(self, batches: Batches) -> tuple[Any, float]:
        """Take one optimizer step. Returns (loss, 0), because the norm is not computed."""
        pixels, labels = next(batches)
        if self.in_backward:
            self.in_backward.begin()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.in_backward is None):
            loss = sigmoid_loss(self.net(pixels), labels)
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.steps += 1
        if self.average is not None:
            self.average.update(self.steps)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.detach(), 0.0


def train(run: OneCardRun) -> list[loop.StepResult]:
    """Train. Returns the result of each step."""
    speak = Every()
    results: list[loop.StepResult] = []
    loop.train(run, results.append, tick=lambda _: speak(f"step {run.done} of {run.cadence.steps}"))
    return results


def average_bytes(method: str, name: str, size: int, shape: tuple[int, int], rank: int) -> int:
    """Bytes of the averaged weights: 4 for each trained parameter. Arguments as for `build`."""
    with torch.device("meta"):
        net: Any = timm.create_model(name, img_size=size, in_chans=shape[0], num_classes=shape[1])
    if method != "nf4":
        return 4 * sum(p.numel() for p in net.parameters())
    count = sum(p.numel() for p in net.head.parameters())
    for key, parameter in net.named_parameters():
        if nf4_lora.is_adapted(key, parameter.shape):
            count += rank * sum(parameter.shape)
    return 4 * count


def save_average(average: AveragedWeights, out: Path) -> Path:
    """Write `averaged.safetensors`: all parameters, or the adapters and the classifier of nf4."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    path = out / "averaged.safetensors"
    save_file({name: shard.contiguous() for name, shard in average.shards.items()}, path)
    return path


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
