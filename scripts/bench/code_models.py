"""The models of `code_structure.py`: each with a loss on one batch.

Vision transformers are trained here on photos, for some hundred steps: no package was found that ships
trained weights of one. The sentence transformer is read from a directory, with its trained weights.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.training.data.packaged import ImageSet, light_augmentation, load, train_batches

GUIDES = Path(__file__).resolve().parents[2] / "docs/guides"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: for the rows.
        network: in training mode if it learns from images.
        loss: a function without arguments; the loss of the batch, a scalar.
        images: images of the batch, or texts.
    """

    name: str
    network: nn.Module
    loss: Callable[[], Tensor]
    images: int


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that is trained on photos.

    Attributes:
        described: in one phrase, with the number of tokens.
        model: a timm model, or "small_vit".
        options: of the timm model.
        size: of the images in pixels.
        batch: images of a training step.
        measured: images of the batch that is measured.
    """

    described: str
    model: str
    options: dict[str, Any]
    size: int
    batch: int
    measured: int


_NARROW = {"patch_size": 4, "embed_dim": 192, "num_heads": 3}
TRAINED = {
    "small": Trained("small_vit (16 tokens)", "small_vit", {}, 32, 64, 32),
    "deit": Trained(
        "DeiT (width 192, 8 blocks, 65 tokens)",
        "deit_tiny_patch16_224",
        {**_NARROW, "depth": 8, "img_size": 32},
        32,
        16,
        8,
    ),
    # Four registers, and LayerScale from 1e-5.
    "dinov2": Trained(
        "DINOv2 style (width 192, 4 blocks, 201 tokens)",
        "vit_small_patch14_reg4_dinov2",
        {**_NARROW, "depth": 4, "img_size": 56},
        56,
        4,
        4,
    ),
    "litv2": Trained("litv2_tiny (256 to 4 tokens)", "litv2_tiny", {"img_size": 64}, 64, 16, 8),
}
NAMES = ("random", *TRAINED, "sentences")


def subject(name: str, data: str, steps: int, weights: Path | None, sentences: str) -> Subject:
    """The model of a name in `NAMES`.

    Args:
        name: of the model.
        data: an image set for `load`; for the models of `TRAINED`.
        steps: training steps; 0 for random weights.
        weights: a directory that keeps trained weights between runs; None keeps none.
        sentences: a directory with a sentence transformer.
    Raises:
        ValueError: the name is unknown, or the model's data or directory is missing.
    """
    if name == "random":
        return random_vit()
    if name == "sentences" and sentences:
        return language_model(sentences)
    if name in TRAINED and data:
        return trained_vit(name, _images(data), steps, weights)
    raise ValueError(
        f"model {name!r} is not one of {', '.join(NAMES)}, or its data or sentences are missing"
    )


@functools.cache
def _images(data: str) -> ImageSet:
    return load(data)


def random_vit() -> Subject:
    """ViT-S at random initialisation, on noise of 112 x 112 pixels."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch16_224", num_classes=10, img_size=112).train()
    x, y = torch.randn(8, 3, 112, 112), torch.randint(0, 10, (8,))
    return Subject(
        "vit_small_patch16_224 (50 tokens), random",
        network,
        lambda: F.cross_entropy(network(x), y),
        8,
    )


def trained_vit(name: str, images: ImageSet, steps: int, weights: Path | None) -> Subject:
    """A model of `TRAINED` after `steps` steps, and a batch that it has not seen in this order."""
    recipe = TRAINED[name]
    network = _network(recipe, images).train()
    kept = weights / f"{name}-{steps}.pt" if weights else None
    if kept is not None and kept.exists():
        network.load_state_dict(torch.load(kept))
    elif steps:
        _train(network, batches(recipe, images, seed=0), steps)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(network.state_dict(), kept)
    x, y = (part[: recipe.measured] for part in next(batches(recipe, images, seed=1)))
    after = f"{steps} steps on {images.name}" if steps else "random"
    return Subject(
        f"{recipe.described}, {after}", network, lambda: F.cross_entropy(network(x), y), len(x)
    )


def _network(recipe: Trained, images: ImageSet) -> nn.Module:
    import timm

    import mesa_train.models  # noqa: F401  timm knows them from here on
    from mesa_train.training import small_models

    if recipe.model == small_models.SMALL_VIT:
        return small_models.build(recipe.model, images, seed=0)[0]
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(
        recipe.model, num_classes=images.num_classes, in_chans=images.channels, **recipe.options
    )
    return made


def batches(recipe: Trained, images: ImageSet, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented batches without end, at the size of the recipe."""
    from torchvision.transforms import v2

    resized = v2.Resize(recipe.size, antialias=True)
    transform = v2.Compose([light_augmentation(images), resized])
    for epoch in itertools.count():
        yield from train_batches(images, recipe.batch, seed=seed, epoch=epoch, transform=transform)


def _train(network: nn.Module, data: Iterator[tuple[Tensor, Tensor]], steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for x, y in itertools.islice(data, steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"last training loss {loss.item():.3f}", flush=True)


def language_model(directory: str) -> Subject:
    """A trained sentence transformer, with a contrastive loss of neighbouring texts."""
    from transformers import AutoModel, AutoTokenizer

    network = AutoModel.from_pretrained(directory, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    words = " ".join(page.read_text() for page in sorted(GUIDES.glob("*.md"))).split()
    texts = [" ".join(words[60 * k : 60 * k + 60]) for k in range(32)]
    inputs = tokenizer(
        texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    )

    def loss() -> Tensor:
        hidden = network(input_ids=inputs["input_ids"]).last_hidden_state
        embedded = F.normalize(hidden.mean(1), dim=-1)
        return F.cross_entropy(20 * embedded[0::2] @ embedded[1::2].T, torch.arange(16))

    return Subject("MiniLM-L6 sentence transformer, trained", network, loss, 32)
