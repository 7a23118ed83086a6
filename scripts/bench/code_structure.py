"""What other codes than affine groups of 128 would give: gradient errors of quantised stashes.

The operators of `Affine` are replaced by functions that round in float32 and keep the rounded
values, so any code can be tried without a kernel. Every variant has an exact count of bits per
element. The variants are finer groups, 8-bit scales, removed means, scales per channel, a Hadamard
rotation, and Lloyd-Max levels. Each operand is measured alone, and then the preset as a whole. An
error is the mean over draws. A row for each model, operand and variant goes to
docs/results/code_structure.jsonl.

The models: a timm ViT at random initialisation; ViTs that the script trains on photos (--data); and
a trained sentence transformer, if a directory has one (--sentences).

    python scripts/bench/code_structure.py --data cifar10:DIRECTORY --sentences DIRECTORY
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
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
from torch import Tensor, nn

import mesa_train
from mesa_train import PRESETS, Policy, codecs
from mesa_train.codecs.affine import Affine, group_shape
from mesa_train.kernels.reference import ACTIVATIONS
from mesa_train.measure.step import relative_error
from mesa_train.ops.norm import token_norm_gradients
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
ALL = "mesa4"
# Rows of a tensor that a mean or deviation of channels is computed from.
SAMPLED_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to code. The defaults are the engine's affine codes.

    Attributes:
        mean: "image" or "batch": a mean for each channel is stored once and removed.
        deviation: each channel is divided by its standard deviation.
        rotation: a Hadamard transform of 128 or 64 neighbouring channels.
        lloyd: the levels of Lloyd and Max for a normal distribution, no scale and no zero.
        group: elements of a group; None for the preset's.
        scale_bits: bits of a scale and of a zero. With 8, the row has its largest magnitude too.
    """

    mean: str = ""
    deviation: bool = False
    rotation: bool = False
    lloyd: bool = False
    group: int | None = None
    scale_bits: int = 16

    def bits(self, codec: Affine, rows: int, cols: int, tokens: int) -> float:
        """Stored bits of an element of a (rows, cols) tensor."""
        vectors = {"image": rows // tokens, "batch": 1}.get(self.mean, 0) + self.deviation
        total = codec.bits + 16 * vectors / rows
        if self.lloyd:
            return total
        groups, _ = group_shape(cols, self.group or codec.group_size)
        return total + (2 * self.scale_bits * groups + 16 * (self.scale_bits == 8)) / cols


VARIANTS = {
    "affine, groups of 128": Variant(),
    "groups of 64": Variant(group=64),
    "groups of 32": Variant(group=32),
    "8-bit scales, groups of 64": Variant(group=64, scale_bits=8),
    "8-bit scales, groups of 32": Variant(group=32, scale_bits=8),
    "mean of each image": Variant(mean="image"),
    "mean of the batch": Variant(mean="batch"),
    "mean and deviation of channels": Variant(mean="batch", deviation=True),
    "rotation": Variant(rotation=True),
    "mean of the batch, rotation": Variant(mean="batch", rotation=True),
    "rotation, Lloyd-Max levels": Variant(rotation=True, lloyd=True),
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


# --- codes that round in float32 ---


@dataclasses.dataclass(frozen=True)
class Rounded(Affine):
    """A codec whose codes are the rounded values themselves, in float32."""

    variant: Variant = Variant()
    role: str = ""  # of the tensors that `variant` is for; the other tensors have affine codes
    tokens: int = 1
    used: tuple[list[float], ...] = ()

    def encode(self, x: Tensor) -> Any:
        return self._rounded(x, "linear" if self.stochastic else "activation")

    def encode_parts(self, x: Tensor, parts: int) -> list[Any]:
        return [self.encode(part) for part in x.chunk(parts, 1)]

    def encode_normalized(self, x: Tensor, mean: Tensor | None, rstd: Tensor) -> Any:
        centred = x.float() if mean is None else x.float() - mean.float()[:, None]
        return self._rounded(centred * rstd.float()[:, None], "x_hat")

    def decode(
        self,
        codes: Any,
        cols: int,  # noqa: ARG002
        dtype: torch.dtype,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        value = codes[0] if weight is None else codes[0] * weight.float()
        return (value if bias is None else value + bias.float()).to(dtype)

    def norm_backward(
        self, codes: Any, grad: Tensor, rstd: Tensor, weight: Tensor | None, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return token_norm_gradients(grad.float(), codes[0], rstd.float(), weight, centred)

    def activation_decode(self, codes: Any, cols: int, dtype: torch.dtype, kind: str) -> Tensor:  # noqa: ARG002
        return ACTIVATIONS[kind][0](codes[0]).to(dtype)

    def activation_backward(self, codes: Any, grad: Tensor, kind: str) -> Tensor:
        return ACTIVATIONS[kind][1](grad.float().contiguous(), codes[0]).to(grad.dtype)

    def activation_pair(self, codes: Any, grad: Tensor, kind: str) -> Any:
        value = ACTIVATIONS[kind][0](codes[0]).to(grad.dtype)
        return self.activation_backward(codes, grad, kind), value

    def activation_pair_sum(self, codes: Any, grad: Tensor, kind: str) -> Any:
        dx, value = self.activation_pair(codes, grad, kind)
        return dx, value, dx.float().sum(0)

    def _rounded(self, x: Tensor, role: str) -> tuple[Tensor, Tensor]:
        chosen = role == self.role or self.role == ALL
        variant = self.variant if chosen and len(x) % self.tokens == 0 else Variant()
        if chosen:
            self.used[0].append(variant.bits(self, *x.shape, self.tokens) * x.numel())
            self.used[1].append(x.numel())
        return code(x.float(), self, variant, self.tokens), x.new_zeros(1)


def code(x: Tensor, codec: Affine, variant: Variant, tokens: int) -> Tensor:
    """(rows, cols) in float32, coded and decoded."""
    shift, factor = torch.zeros(()), torch.ones(())
    sample = x[:: max(1, len(x) // SAMPLED_ROWS)]
    if variant.mean == "image":
        of_image = x.view(-1, tokens, x.shape[1]).mean(1, keepdim=True).bfloat16().float()
        shift = of_image.expand(-1, tokens, -1).reshape(x.shape)
    elif variant.mean == "batch":
        shift = sample.mean(0, keepdim=True).bfloat16().float()
    if variant.deviation:
        factor = ((sample - shift).std(0, keepdim=True) + 1e-3 * sample.std()).bfloat16().float()
    value = (x - shift) / factor
    rotates = variant.rotation and x.shape[1] % 64 == 0
    if rotates:
        value = rotate(value)
    value = lloyd(value, codec.bits) if variant.lloyd else affine(value, codec, variant)
    if rotates:
        value = rotate(value)
    return value * factor + shift


def affine(x: Tensor, codec: Affine, variant: Variant) -> Tensor:
    """Affine codes of groups, with dither if the codec has it."""
    rows, cols = x.shape
    groups, size = group_shape(cols, variant.group or codec.group_size)
    columns = torch.arange(groups * size).clamp(max=cols - 1)
    grouped = x[:, columns].view(rows, groups, size)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    levels = 2**codec.bits - 1
    if variant.scale_bits == 8:
        most = x.abs().amax(1).view(rows, 1, 1).clamp(min=1e-30)
        zero = (torch.floor(low / most * 127) / 127) * most
        # Scales in steps of a sixteenth of an octave, below 2 * most.
        octaves = torch.floor(-16 * torch.log2(((high - zero) / (2.02 * most)).clamp(min=1e-9)))
        scale = 2.02 * most * 2 ** (-octaves.clamp(0, 255) / 16) / levels
    else:
        zero = _bfloat16(low, -1)
        scale = _bfloat16((high - zero) / levels, 1)
    steps = (grouped - zero) * torch.where(scale > 0, scale.reciprocal(), 0)
    if codec.dither:
        drawn = torch.rand_like(steps)
        codes = torch.floor(steps + drawn).clamp(0, levels) - drawn + 0.5
    else:
        codes = steps.round().clamp(0, levels)
    return (codes * scale + zero).view(rows, -1)[:, :cols]


def _bfloat16(x: Tensor, direction: int) -> Tensor:
    """x rounded to bfloat16, up for direction 1 and down for -1."""
    near = x.bfloat16().float()
    step = near.abs() * 2**-7
    return torch.where(
        (near - x) * direction < 0, (near + direction * step).bfloat16().float(), near
    )


def rotate(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of 128 neighbouring channels, or of 64."""
    size = 128 if x.shape[1] % 128 == 0 else 64
    value = x.reshape(len(x), -1, size)
    for half in (2**k for k in range(size.bit_length() - 1)):
        pairs = value.view(*value.shape[:2], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        value = torch.stack((first + second, first - second), -2).view(value.shape)
    return (value / math.sqrt(size)).reshape(x.shape)


def lloyd(x: Tensor, bits: int) -> Tensor:
    """x rounded to the levels with the least squared error for a normal distribution."""
    levels = _lloyd_levels(bits)
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def _lloyd_levels(bits: int, cache: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    """Lloyd's iteration on a fine grid (S. Lloyd, Least squares quantization in PCM, 1982)."""
    if bits not in cache:
        x = torch.linspace(-6, 6, 20001, dtype=torch.float64)
        density = torch.exp(-(x**2) / 2)
        levels = torch.linspace(-3, 3, 2**bits, dtype=torch.float64)
        for _ in range(3000):
            cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
            mass = torch.zeros_like(levels).index_add_(0, cell, density)
            levels = torch.zeros_like(levels).index_add_(0, cell, density * x) / mass
        cache[bits] = levels.float()
    return cache[bits]


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


def rounded_codec(
    variant: Variant,
    role: str,
    tokens: int,
    used: tuple[list[float], ...],
    bits: int,
    group_size: int,
    rounding: str,
    running: bool,  # noqa: ARG001
) -> Any:
    """In place of `codecs.of`. Codecs of 8 and 32 bits stay as they are."""
    stochastic, dither = rounding != "nearest", rounding == "dither"
    if bits == 32:
        return codecs.Lossless()
    if bits == 8:
        return Affine(bits, group_size, stochastic, dither=dither)
    return Rounded(bits, group_size, stochastic, 0, dither, variant, role, tokens, used)


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
