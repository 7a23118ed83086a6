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

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import packaged
from mesa_train.training.data.table import read_table
from mesa_train.training.evaluation import label_subsets
from mesa_train.training.evaluation.suite import images as suite
from mesa_train.training.evaluation.suite.images import Images

from .config import DataConfig
from .towers import imagenet_names, prompts_of

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
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
    """Labelled images and the names of their classes."""

    name: str
    images: Images
    names: tuple[str, ...]


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
    """ImageNet's other test sets that are under `data.sets`.

    Raises:
        ConfigError: the folder has none of them, or the classes are not ImageNet's.
    """
    if config.sets is None:
        return []
    root = Path(config.sets)
    there = [subset for subset in label_subsets.SUBSETS if (root / subset).is_dir()]
    if not there or len(names) != label_subsets.CLASSES:
        raise ConfigError(
            f"data.sets: {root} must hold folders of {', '.join(label_subsets.SUBSETS)}, and "
            f"data.held_out 1,000 classes; got {', '.join(there) or 'none'} and {len(names)} classes"
        )
    found = []
    for subset in there:
        images = suite.of_subset(root / subset, subset)
        if subset == "objectnet":
            about = label_subsets.class_list("objectnet_113")["folders"]
            labels = tuple(folder.replace("_", " ") for folder in about)
        else:
            labels = tuple(names[c[0]] for c in label_subsets.subset_columns(subset))
        found.append(ZeroShotSet(subset, images, labels))
    return found


def crop(image: Any, smallest: float) -> Any:
    """A random crop of a PIL image with at least a share `smallest` of its area."""
    from torchvision.transforms import v2

    if smallest >= 1:
        return image
    size = [image.height, image.width]
    return v2.RandomResizedCrop(size, scale=(smallest, 1.0), antialias=True)(image)
