"""Images with captions, and labelled images for the zero-shot evaluation.

Captions come from a CSV file, or are made from the class names of labelled images by prompts. The
prompt of an image depends on (seed, epoch, image) alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import packaged
from mesa_train.training.data.table import read_table
from mesa_train.training.evaluation import label_subsets
from mesa_train.training.evaluation.suite import images as suite
from mesa_train.training.evaluation.suite.images import Images

from .config import DataConfig
from .towers import imagenet_names, prompts_of

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Folder of ImageNet's validation images for ReaL.
VALIDATION = "imagenet-val"
_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Pairs:
    """Training images with captions.

    Attributes:
        images: their labels number the captions' rows in a CSV, else the classes.
        captions: of each image; None if captions are made of names and prompts.
        names: of the classes; empty for a CSV.
        prompts: of the captions that are made.
    """

    images: Images
    captions: list[str] | None
    names: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def caption(self, index: int, seed: int, epoch: int) -> str:
        """The caption of an image in an epoch."""
        if self.captions is not None:
            return self.captions[index]
        stream = np.random.default_rng((seed, epoch, index))
        prompt = self.prompts[int(stream.integers(len(self.prompts)))]
        return prompt.replace("{}", self.names[int(self.images.labels[index])])


@dataclass(frozen=True)
class ZeroShotSet:
    """Labelled images and the names of their classes.

    Attributes:
        name: of the set.
        images: with a label each.
        names: of the classes.
        subset: one of ImageNet's sets whose images are resized by a rule of their own; default "".
        answers: of each image all right classes, of ReaL; default: the label alone. Images without
            an answer do not count.
    """

    name: str
    images: Images
    names: tuple[str, ...]
    subset: str = ""
    answers: tuple[tuple[int, ...], ...] | None = None

    def short_side(self, size: int) -> int | None:
        """The short side of the resize before a crop of `size` pixels; None for the square resize."""
        return suite.short_side_of(self.subset, size) if self.subset else None

    def hits(self, guesses: Tensor) -> Tensor:
        """True for each guess (N, k) that is right: (N', k) over the images that count."""
        if self.answers is None:
            return guesses == self.images.labels[:, None]
        rows = [
            [guess in right for guess in row]
            for row, right in zip(guesses.tolist(), self.answers, strict=True)
            if right
        ]
        if not rows:
            raise ConfigError(f"data.sets: no image of {self.images.name} has a ReaL label")
        return torch.tensor(rows)

    def __len__(self) -> int:
        """The number of images that count."""
        return len(self.images) if self.answers is None else sum(map(bool, self.answers))


def load(config: DataConfig) -> tuple[Pairs, list[ZeroShotSet]]:
    """The training pairs, and the sets of the evaluation; the first is that of the epochs.

    Raises:
        ConfigError: a file, a column or a class name is missing.
    """
    if config.train in packaged.BUILTIN:
        train, test = suite.of_package(config.train)
        names = tuple(DIGITS[int(name)] for name in train.classes)
        made = Pairs(train, None, names, tuple(prompts_of(config.prompts)))
        return made, [ZeroShotSet(test.name, test, names)]
    if Path(config.train).is_dir():
        assert config.held_out is not None
        train, test = _folders(config)
        names = class_names(train.classes, config.class_names)
        made = Pairs(train, None, names, tuple(prompts_of(config.prompts)))
        return made, [ZeroShotSet(test.name, test, names), *further(config, names)]
    made = of_csv(Path(config.train))
    if config.held_out is None:
        return made, []
    test = suite.of_folder(Path(config.held_out), "data.held_out")
    names = class_names(test.classes, config.class_names)
    return made, [ZeroShotSet(test.name, test, names), *further(config, names)]


def _folders(config: DataConfig) -> tuple[Images, Images]:
    try:
        return suite.of_folders(config.train, str(config.held_out))
    except ConfigError as error:
        line = str(error).replace("--train", "data.train").replace("--held-out", "data.held_out")
        raise ConfigError(line) from None


def of_csv(path: Path) -> Pairs:
    """Read a CSV file with the columns file and caption.

    Raises:
        ConfigError: the file, a column or a value is wrong.
    """
    rows = read_table(path, ("file", "caption"), "data.train")
    for number, row in enumerate(rows, start=2):
        if not row["file"] or not (path.parent / row["file"]).is_file():
            raise ConfigError(f"data.train: {path}, line {number}: no file {row['file']}")
        if not row["caption"].strip():
            raise ConfigError(f"data.train: {path}, line {number}: the caption is empty")
    files = [str(path.parent / row["file"]) for row in rows]
    images = Images(
        str(path), lambda i: suite.image_of(files[i]), torch.arange(len(rows)), (),
        stamp=suite.stamp(files),
    )  # fmt: skip
    return Pairs(images, [row["caption"] for row in rows])


def class_names(folders: Sequence[str], path: str | None) -> tuple[str, ...]:
    """The names of class folders.

    Raises:
        ConfigError: the file has another number of names, or the folders are WordNet ids of a part
            of ImageNet.
    """
    if path is not None:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        if len(names) != len(folders):
            raise ConfigError(
                f"data.class_names: {path} has {len(names)} names for {len(folders)} class folders"
            )
    elif all(_SYNSET.fullmatch(folder) for folder in folders):
        names = imagenet_names()
        if len(folders) != len(names):
            raise ConfigError(
                f"data.class_names is missing: {len(folders)} folders have WordNet ids as names"
            )
    else:
        names = list(folders)
    # CLIP's lists separate synonyms by commas; the first counts.
    return tuple(name.split(",")[0].replace("_", " ").strip() for name in names)


def further(config: DataConfig, names: Sequence[str]) -> list[ZeroShotSet]:
    """ImageNet's other test sets that are under `data.sets`, and its validation images with ReaL labels.

    Raises:
        ConfigError: the folder has none of them, or the classes are not ImageNet's.
    """
    if config.sets is None:
        return []
    root, known = Path(config.sets), (*label_subsets.SUBSETS, VALIDATION)
    there = [subset for subset in known if (root / subset).is_dir()]
    if not there or len(names) != label_subsets.CLASSES:
        raise ConfigError(
            f"data.sets: {root} must hold folders of {', '.join(known)}, and data.held_out 1,000 "
            f"classes; got {', '.join(there) or 'none'} and {len(names)} classes"
        )
    return [
        _real(root / VALIDATION, names) if subset == VALIDATION else _other(root, subset, names)
        for subset in there
    ]


def _other(root: Path, subset: str, names: Sequence[str]) -> ZeroShotSet:
    """ImageNet-A, -R, -v2 or ObjectNet: their own classes alone."""
    images = suite.of_subset(root / subset, subset)
    if subset == "objectnet":
        about = label_subsets.class_list("objectnet_113")["folders"]
        labels = tuple(folder.replace("_", " ") for folder in about)
    else:
        labels = tuple(names[c[0]] for c in label_subsets.subset_columns(subset))
    return ZeroShotSet(subset, images, labels, subset)


def _real(path: Path, names: Sequence[str]) -> ZeroShotSet:
    """ImageNet's validation images; any of their ReaL labels is right."""
    images, real = suite.of_validation(path), label_subsets.real_labels()
    answers = tuple(real[i] for i in images.labels.tolist())
    return ZeroShotSet("ReaL", images, tuple(names), answers=answers)


def crop(image: Any, smallest: float) -> Any:
    """A random crop of a PIL image with at least a share `smallest` of its area."""
    from torchvision.transforms import v2

    if smallest >= 1:
        return image
    size = [image.height, image.width]
    return v2.RandomResizedCrop(size, scale=(smallest, 1.0), antialias=True)(image)
