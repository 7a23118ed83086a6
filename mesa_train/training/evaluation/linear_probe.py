"""Linear probe and nearest neighbours on frozen features, which are extracted once and cached.

ViT-22B's probe is SGD with momentum for 10 epochs at 224 px on features of a frozen model. Its only
augmentation is a mild crop and a flip (arXiv 2302.05442). An epoch through 22 billion parameters
costs far more than the probe. Therefore `datasets` caches a few views of every image on disk, and
each epoch takes the next view. Nearest neighbours use views without augmentation.

The features are the input of the classifier: the output of attention pooling.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fewshot import knn

Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def extract(
    model: Any, batches: Batches, device: str | torch.device, autocast: torch.dtype | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute features of batches of images.

    Args:
        model: with timm's `forward_features` and `forward_head`.
        batches: images and labels.
        device: of the model.
        autocast: dtype of autocast; default: none.
    Yields:
        (features (B, D) in float32, labels (B,)), on the CPU.
    """
    training = model.training
    model.eval()
    kind = torch.device(device).type
    try:
        for images, labels in batches:
            with torch.autocast(kind, autocast, enabled=autocast is not None):
                tokens = model.forward_features(images.to(device))
                found = model.forward_head(tokens, pre_logits=True)
            yield found.float().cpu(), labels.cpu()
    finally:
        model.train(training)


def cached(
    folder: Path, key: str, make: Callable[[], Batches], half: bool = True
) -> tuple[Tensor, Tensor]:
    """Read features from a folder, or compute and write them there.

    Args:
        folder: of the cache.
        key: identifies the features.
        make: computes batches of features and labels.
        half: store float16, 2 bytes a number; default true.
    Returns:
        (features (N, D) in float32, labels (N,)).
    Raises:
        ValueError: a feature is not finite in the stored dtype.
    """
    from datasets import Dataset, Features, List, Value, load_from_disk

    path = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not path.is_dir():
        kind = "float16" if half else "float32"

        def rows() -> Iterator[dict[str, Any]]:
            for values, labels in make():
                stored = values.half() if half else values
                if not stored.isfinite().all():
                    raise ValueError(
                        "a feature is not finite in float16; store float32 (half=False)"
                        if values.isfinite().all()
                        else "a feature is not finite: these weights cannot be probed"
                    )
                for value, label in zip(stored.numpy(), labels.tolist(), strict=True):
                    yield {"feature": value, "label": label}

        building, beside = folder / f".{path.name}.rows", folder / f".{path.name}.partial"
        shutil.rmtree(building, ignore_errors=True)
        try:
            made = Dataset.from_generator(
                rows,
                features=Features({"feature": List(Value(kind)), "label": Value("int64")}),
                cache_dir=str(building),
                keep_in_memory=False,
            )
        except Exception as error:
            # `datasets` wraps the error of a generator.
            if isinstance(error.__cause__, ValueError):
                raise ValueError(str(error.__cause__)) from None
            raise
        made.save_to_disk(str(beside))
        beside.rename(path)
        shutil.rmtree(building, ignore_errors=True)
    found = load_from_disk(str(path)).with_format("numpy")
    features = torch.from_numpy(found[:]["feature"]).float()
    return features, torch.from_numpy(found[:]["label"])


@dataclass(frozen=True)
class Probe:
    """A trained linear classifier.

    Attributes:
        weight: (classes, D).
        bias: (classes,).
        lr: the chosen learning rate.
        accuracy: on the held-out images, 0 to 1.
        chosen_on: number of training images on which the rate was chosen.
    """

    weight: Tensor
    bias: Tensor
    lr: float
    accuracy: float
    chosen_on: int = 0

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, classes) of features (N, D)."""
        return F.linear(features, self.weight, self.bias)


def linear_probe(
    views: Sequence[tuple[Tensor, Tensor]],
    held_out: tuple[Tensor, Tensor],
    *,
    rates: Sequence[float] = (0.03, 0.1, 0.3, 1.0),
    epochs: int = 10,
    momentum: float = 0.9,
    batch_size: int | None = None,
    seed: int = 0,
) -> Probe:
    """Train a linear classifier on frozen features: SGD with momentum and a cosine schedule.

    The learning rate is chosen on training images that are held back: 1 % of them, as in the
    published protocol, but of a small set a tenth or 1,000, whichever is less, and at least one.

    Args:
        views: (features, labels) of the same images, one entry for each view.
        held_out: (features, labels) for the accuracy.
        rates: learning rates to compare.
        epochs: default 10.
        momentum: default 0.9.
        batch_size: default: at most 1,024, at least 16, and small enough for 500 steps. Ten epochs
            of a small set in large batches end far from the optimum.
        seed: of the order.
    Raises:
        ValueError: the views hold different images, or fewer than 3.
    """
    labels = views[0][1]
    if len(labels) < 3:
        raise ValueError(f"a linear probe needs at least 3 training images, got {len(labels)}")
    if any(len(x) != len(labels) or not torch.equal(y, labels) for x, y in views):
        raise ValueError("all views must hold the same images in the same order")
    if batch_size is None:
        batch_size = min(1024, max(16, epochs * len(labels) // 500))
    classes = int(torch.cat([labels, held_out[1]]).max()) + 1
    stream = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=stream)
    few = held_back(len(order))
    chosen, kept = order[:few], order[few:]
    best: tuple[float, float] = (-1.0, rates[0])
    if len(rates) > 1:
        for lr in rates:
            w, b = _fit(views, kept, classes, lr, epochs, momentum, batch_size, seed)
            best = max(best, (_accuracy(views[0][0][chosen], labels[chosen], w, b), lr))
    w, b = _fit(views, order, classes, best[1], epochs, momentum, batch_size, seed)
    return Probe(w, b, best[1], _accuracy(*held_out, w, b), len(chosen))


def held_back(images: int) -> int:
    """How many of the training images choose the learning rate; see `linear_probe`."""
    return max(1, images // 100, min(images // 10, 1000))


def nearest_neighbours(
    train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], k: int = 20, heat: float = 0.07
) -> float:
    """Accuracy of the vote of the k training features with the highest cosine similarity.

    Args:
        train: (features, labels).
        held_out: (features, labels).
        k: default 20.
        heat: a vote counts exp(similarity / heat); default 0.07.
    Raises:
        ValueError: there are fewer than k training features.
    """
    guesses = knn(*train, held_out[0], k, temperature=heat)
    return float((torch.from_numpy(guesses) == held_out[1]).double().mean())


def _fit(
    views: Sequence[tuple[Tensor, Tensor]],
    images: Tensor,
    classes: int,
    lr: float,
    epochs: int,
    momentum: float,
    batch_size: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Train the classifier at one rate. Returns (weight, bias)."""
    # Features of a large model differ in scale. The classifier is trained on standardised features.
    # The mean and deviation are then folded into its weight and bias.
    everything = views[0][0][images]
    mean, deviation = everything.mean(0), everything.std(0).clamp_min(1e-6)
    weight = torch.zeros(classes, len(mean), requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=momentum)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stream = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        features, labels = views[epoch % len(views)]
        for batch in images[torch.randperm(len(images), generator=stream)].split(batch_size):
            x = (features[batch] - mean) / deviation
            loss = F.cross_entropy(F.linear(x, weight, bias), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    w = weight.detach() / deviation
    return w, bias.detach() - w @ mean


def _accuracy(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Share of correct answers, 0 to 1."""
    return (F.linear(features, weight, bias).argmax(-1) == labels).float().mean().item()
