"""Gradient errors of other codes than affine groups of 128.

`structured_codes.py` replaces the operators of `Affine`, so no code needs a kernel. Every variant
has an exact count of bits per element. The variants are finer groups, 8-bit scales, removed means,
scales per channel, a Hadamard rotation, and Lloyd-Max levels. Each operand is measured alone, and
then the preset as a whole. An error is the mean over draws. A row for each model, operand and
variant goes to docs/results/code_structure.jsonl.

The models: a timm ViT at random initialisation; ViTs that the script trains on photos (--data); and
a trained sentence transformer, if a directory has one (--sentences).

    python scripts/bench/code_structure.py --data cifar10:DIRECTORY --sentences DIRECTORY
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

os.environ["MESA_TRAIN_NATIVE"] = "0"  # the native rows call the kernels themselves

import torch
import torch.nn.functional as F
import typer
from structured_codes import ALL, VARIANTS, rounded_codec
from torch import Tensor, nn

import mesa_train
from mesa_train import PRESETS, Policy, codecs
from mesa_train.measure.step import relative_error
from mesa_train.utils import records

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/code_structure.jsonl"

# Operands of mesa4 that are measured alone: by name, the policy's pattern, the role of the tensor.
OPERANDS = {
    "x_hat": ("layer_norm", "x_hat"),
    "GELU's input": ("activation", "activation"),
    "q": ("attention.q", "linear"),
    "v": ("attention.v", "linear"),
    "attention's output": ("attention.out", "linear"),
}


def main(
    data: Annotated[str, typer.Option(help="Photos to train on, such as cifar10:DIRECTORY.")] = "",
    sentences: Annotated[
        str, typer.Option(help="A directory with a trained sentence transformer.")
    ] = "",
    models: Annotated[
        str, typer.Option(help="Comma-separated, of random, small, deit, sentences.")
    ] = "random,small,deit,sentences",
    steps: Annotated[int, typer.Option(min=1, help="Training steps on photos.")] = 500,
    draws: Annotated[int, typer.Option(min=1)] = 3,
    weights: Annotated[
        Path | None, typer.Option(help="A directory that keeps trained weights between runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Measure all variants on the chosen models."""
    for name in models.split(","):
        if name == "random":
            described, subject = "vit_small_patch16_224, random", random_vit()
        elif name in ("small", "deit") and data:
            described = f"{name} ViT, {steps} steps on {data.split(':')[0]}"
            subject = trained_vit(name, data, steps, weights)
        elif name == "sentences" and sentences:
            described, subject = (
                "MiniLM-L6 sentence transformer, trained",
                language_model(sentences),
            )
        else:
            raise SystemExit(
                f"code_structure: --models {name!r} is not one of random, small, deit, sentences, "
                "or its --data or --sentences is missing"
            )
        for row in measure(*subject, draws):
            print(described, row, flush=True)
            records.append(out, {"model": described, "draws": draws, **row, **records.provenance()})


# --- measurements ---

Loss = Callable[[], Tensor]


def measure(network: nn.Module, loss: Loss, tokens: int, draws: int) -> Iterator[dict[str, Any]]:
    """The rows of one model."""
    exact = gradients(network, loss, None)
    preset = PRESETS[ALL]
    alone = {
        name: (Policy(bits=32, overrides={pattern: width(preset, pattern)}), role)
        for name, (pattern, role) in OPERANDS.items()
    }
    for operand, (policy, role) in {**alone, ALL: (preset, ALL)}.items():
        for named, variant in VARIANTS.items():
            if variant.lloyd and role not in ("x_hat", ALL):
                continue  # the levels are for a variance of 1
            used: tuple[list[float], ...] = ([], [])
            of = functools.partial(rounded_codec, variant, role, tokens, used)
            errors = []
            for draw in range(draws):
                torch.manual_seed(draw)
                with mock.patch.object(codecs, "of", of):
                    found = gradients(network, loss, policy)
                errors.append(relative_error(found, exact))
            yield {
                "operand": operand,
                "variant": named,
                "bits": sum(used[0]) / max(1, sum(used[1])),
                "gradient_error": statistics.fmean(errors),
                "errors": errors,
            }


def width(preset: Policy, pattern: str) -> dict[str, int]:
    """The bits of an operand in a preset."""
    operator = pattern.split(".")[0]
    fields = {**preset.overrides.get(operator, {}), **preset.overrides.get(pattern, {})}
    return {"bits": fields.get("bits", preset.bits)}


def gradients(network: nn.Module, loss: Loss, policy: Policy | None) -> list[Tensor]:
    """The gradients of one step; zeros for an unused weight."""
    if policy is not None:
        mesa_train.wrap(network, policy)
    weights = list(network.parameters())
    found = torch.autograd.grad(loss(), weights, allow_unused=True)
    if policy is not None:
        mesa_train.unwrap(network)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


# --- models: the network, its loss, and tokens of an image or a sentence ---


def random_vit() -> tuple[nn.Module, Loss, int]:
    """ViT-S at random initialisation, on noise of 112 x 112 pixels."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch16_224", num_classes=10, img_size=112).train()
    x, y = torch.randn(8, 3, 112, 112), torch.randint(0, 10, (8,))
    return network, lambda: F.cross_entropy(network(x), y), 50


def trained_vit(
    name: str, data: str, steps: int, weights: Path | None
) -> tuple[nn.Module, Loss, int]:
    """The small ViT, or a DeiT of width 192 and depth 8 with 65 tokens, trained on photos."""
    from timm.models import VisionTransformer

    from mesa_train.training import small_models
    from mesa_train.training.data.packaged import light_augmentation, load, train_batches

    images = load(data)
    if name == "small":
        network, _ = small_models.build("small_vit", images, seed=0)
    else:
        torch.manual_seed(0)
        network = VisionTransformer(32, 4, embed_dim=192, depth=8, num_heads=3, num_classes=10)
    network.train()
    kept = weights / f"{name}-{steps}.pt" if weights else None
    augment = light_augmentation(images)
    if kept is not None and kept.exists():
        network.load_state_dict(torch.load(kept))
    else:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
        batches = itertools.chain.from_iterable(
            train_batches(images, 64, seed=0, epoch=epoch, transform=augment)
            for epoch in itertools.count()
        )
        for x, y in itertools.islice(batches, steps):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(network.state_dict(), kept)
    x, y = next(iter(train_batches(images, 64, seed=1, epoch=0, transform=augment)))
    return network, lambda: F.cross_entropy(network(x), y), 16 if name == "small" else 65


def language_model(directory: str) -> tuple[nn.Module, Loss, int]:
    """A trained sentence transformer, with a contrastive loss of neighbouring texts."""
    from transformers import AutoModel, AutoTokenizer

    network = AutoModel.from_pretrained(directory, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    pages = sorted((RESULTS.parents[1] / "guides").glob("*.md"))
    words = " ".join(page.read_text() for page in pages).split()
    texts = [" ".join(words[60 * k : 60 * k + 60]) for k in range(32)]
    inputs = tokenizer(
        texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    )

    def loss() -> Tensor:
        hidden = network(input_ids=inputs["input_ids"]).last_hidden_state
        embedded = F.normalize(hidden.mean(1), dim=-1)
        return F.cross_entropy(20 * embedded[0::2] @ embedded[1::2].T, torch.arange(16))

    return network, loss, 64


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
