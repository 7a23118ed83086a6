"""A model of 22 billion parameters on one card, from random weights or your own.

    python recipes/vit22b/onecard.py nf4 --model vit_22b      # 24 GB: 4-bit weights, LoRA
    python recipes/vit22b/onecard.py lion --model vit_22b     # 80 GB: every parameter, 8-bit moment
    python recipes/vit22b/onecard.py factored --model vit_22b # 80 GB: every parameter, Adafactor

Says first what memory it expects, part by part, and refuses if the card has less; then trains a few
steps on real images in the model's resolution and says what it took.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

import mesa_train.models  # noqa: F401  registers them with timm
from mesa_train.memory.text import format_bytes
from mesa_train.models.vit22b import SIZES, sigmoid_loss
from mesa_train.models.vit22b_init import initialise
from mesa_train.policy import PRESETS
from mesa_train.training import data, estimates, nf4_lora, sharded_loop
from mesa_train.training.in_backward import METHODS as IN_BACKWARD
from mesa_train.training.in_backward import InBackward
from mesa_train.training.schedule_rsqrt import groups
from mesa_train.training.schema import one_of
from mesa_train.training.sharded_checkpoint import CheckpointError, load_export
from mesa_train.training.sharded_config import CHECKPOINTING, ConfigError
from mesa_train.training.sharded_engines import check_precision, install
from mesa_train.training.sharded_plan import method_of

METHODS = ("nf4", *IN_BACKWARD)


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
    peak_tflops: Annotated[float, typer.Option(help="Of the card; 0 leaves mfu out.")] = 0.0,
    out: Annotated[Path, typer.Option(help="Results.")] = Path("runs/vit22b/onecard"),
) -> None:
    """Train a few steps."""
    try:
        check(method, model, policy, checkpointing)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kept = method_of(policy, checkpointing)
        found = estimates.one_card(model, method, image_size, batch_size, kept, rank)
        predicted = estimates.components(found)
        print("expected:", ", ".join(f"{k} {format_bytes(v)}" for k, v in predicted.items()))
        check_room(sum(predicted.values()), batch_size, device)
        net = build(method, model, image_size, weights, device, rank)
        net.train().set_grad_checkpointing(checkpointing != "none")
        install(net, policy, checkpointing)
        losses, seconds = run(net, method, image_size, batch_size, steps, lr, device)
    except (ConfigError, CheckpointError, ValueError, ImportError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    rate = batch_size / sorted(seconds)[len(seconds) // 2]
    row: dict[str, Any] = {
        "method": method,
        "model": model,
        "image_size": image_size,
        "batch_size": batch_size,
        "policy": policy,
        "checkpointing": checkpointing,
        "losses": losses,
        "images_per_s": rate,
        "predicted_bytes": predicted,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    if peak_tflops:
        flops = rate * sharded_loop.model_flops(model, image_size)
        row["mfu"] = flops / (peak_tflops * 1e12)
    sharded_loop.append_to(out / "results.jsonl")(row)
    print(json.dumps(row, indent=1))


def check(method: str, model: str, policy: str, checkpointing: str) -> None:
    """ValueError or ConfigError for what cannot be run, before memory is spent."""
    one_of("method", method, METHODS)
    one_of("model", model, SIZES)
    one_of("policy", policy, ("plain", *PRESETS))
    one_of("checkpointing", checkpointing, CHECKPOINTING)
    if checkpointing == "coded" and policy == "plain":
        raise ValueError("checkpointing=coded needs a policy other than plain")
    check_precision("pure_bf16")


def check_room(expected: int, batch: int, device: str) -> None:
    """ValueError if the card has less than what is expected."""
    if device != "cuda":
        return
    free, _ = torch.cuda.mem_get_info()
    if expected > free:
        raise ValueError(
            f"{format_bytes(expected)} are expected, the card has {format_bytes(free)} free; take "
            f"fewer images than {batch}, or nf4"
        )


def build(method: str, name: str, size: int, weights: Path | None, device: str, rank: int) -> Any:
    """The model on the device, in 4 bits or bfloat16, from weights or random."""
    with torch.device("meta"):
        net: Any = timm.create_model(
            name, img_size=size, in_chans=1, num_classes=10, dtype=torch.bfloat16
        )
    if method == "nf4":
        read = nf4_lora.reader(weights) if weights else nf4_lora.random_weights(0, device)
        return nf4_lora.quantised(net, read, device, rank=rank)
    net.to_empty(device=device)
    if weights:
        load_export(weights, net)
    else:
        initialise(net, 0, head_bias=-3.0)
    return net


def run(
    net: Any, method: str, size: int, batch: int, steps: int, lr: float, device: str
) -> tuple[list[float], list[float]]:
    """Losses and seconds of the steps, on real images."""
    parameters = groups(net)
    stepper = InBackward(parameters, lr, method) if method in IN_BACKWARD else None
    optimizer = None if stepper else torch.optim.AdamW(parameters, lr=lr)
    losses, seconds = [], []
    batches = data.train_batches(data.load("mnist5k"), batch, seed=0, epoch=0)
    for _, (pixels, labels) in zip(range(steps), batches, strict=False):
        start = time.perf_counter()
        pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear")
        pixels, labels = pixels.to(device, torch.bfloat16), labels.to(device)
        if stepper:
            stepper.begin()
        with torch.autocast(device, torch.bfloat16, enabled=method == "nf4"):
            loss = sigmoid_loss(net(pixels), labels)
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, seconds


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
