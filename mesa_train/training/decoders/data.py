"""Pictures with class maps or depth maps: from folders, composed, or shipped in a package.

A training sample is a random crop, mirrored or not, that depends on (seed, epoch, index) alone.
Evaluation reads whole pictures in sliding windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data.sources import CorruptImage, keeping_random_state, seed_cpu
from mesa_train.training.dense import composed, maps
from mesa_train.training.dense.loader import read_picture
from mesa_train.training.dense.maps import IGNORED as IGNORED

from .config import DataConfig
from .rooms import Rooms

MOTORCYCLE_MM = (994.978 * 193.001, 31.086)
# Crops that are drawn to keep to `data.class_share`.
TRIES = 10
DEPTH_ENDINGS = (".png", ".npy", ".npz")


@dataclass(frozen=True)
class Pictures:
    """Pictures with maps.

    Attributes:
        read: picture i, uint8 (3, H, W), and its map (H, W): classes, or depth in metres.
        count: number of pictures.
        names: of the classes; empty for depth.
    """

    read: Callable[[int], tuple[Tensor, Tensor]]
    count: int
    names: tuple[str, ...] = ()


def load(config: DataConfig) -> tuple[Pictures, Pictures]:
    """Training and held-out pictures.

    Raises:
        ConfigError: a folder, a picture or a map is missing, or the classes are not known.
    """
    if config.source == "motorcycle":
        return _motorcycle()
    if config.source == "rooms":
        known, held_out = _rooms(config)
        return fraction(known, config.fraction, config.fraction_seed), held_out
    if config.source == "composed":
        _compose(config)
    splits = (config.train_split, config.val_split)
    read = _segmentation if config.task == "segmentation" else _depth
    train, val = (read(config, split) for split in splits)
    return fraction(train, config.fraction, config.fraction_seed), val


def sizes(config: DataConfig) -> tuple[int, int, tuple[str, ...]]:
    """(training pictures, held-out pictures, names of the classes). Writes no composed pictures."""
    if config.source in ("composed", "rooms"):
        names = (*composed.names_of(), *composed.PHOTOGRAPHS)
        train = max(1, math.ceil(config.pictures * config.fraction))
        held_out = max(1, config.pictures // 4)
        return train, held_out, names if config.source == "composed" else ()
    found = load(config)
    return found[0].count, found[1].count, found[0].names


def fraction(pictures: Pictures, share: float, seed: int) -> Pictures:
    """The first part of the pictures in an order of the seed, at least one picture."""
    count = max(1, math.ceil(pictures.count * share))
    if count == pictures.count:
        return pictures
    order = np.random.default_rng(seed).permutation(pictures.count)[:count].tolist()
    return Pictures(lambda i: pictures.read(order[i]), count, pictures.names)


def _segmentation(config: DataConfig, split: str) -> Pictures:
    """A split in ADE20K's format."""
    found = maps.load(str(config.path), split, zero_ignored=config.zero_ignored)
    classes = config.classes or len(found.names or ())
    if not classes:
        raise ConfigError(
            f"data.classes is missing: {config.path} has no classes.txt with a name in each line"
        )
    if found.names and len(found.names) != classes:
        raise ConfigError(
            f"data.classes={classes}, but {config.path}/classes.txt has {len(found.names)} names"
        )

    def read(i: int) -> tuple[Tensor, Tensor]:
        picture, labels = found.pairs[i]
        image = read_picture(picture)
        label = torch.from_numpy(maps.read_map(labels, classes, zero_ignored=found.zero_ignored))
        return _same(image, label, picture, labels)

    names = found.names or tuple(str(i) for i in range(classes))
    return Pictures(read, len(found.pairs), names)


def _depth(config: DataConfig, split: str) -> Pictures:
    """A split of pictures and depth maps."""
    images, depths = (Path(str(config.path)) / kind / split for kind in ("images", "depth"))
    for folder in (images, depths):
        if not folder.is_dir():
            raise ConfigError(f"data.path: there is no folder {folder}")
    paths = sorted(
        p
        for p in images.rglob("*")
        if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".tif")
    )
    if not paths:
        raise ConfigError(f"data.path: {images} has no pictures")
    pairs = []
    for path in paths:
        stem = depths / path.relative_to(images)
        there = [stem.with_suffix(e) for e in DEPTH_ENDINGS if stem.with_suffix(e).is_file()]
        if not there:
            raise ConfigError(
                f"data.path: {path} has no depth map {stem.with_suffix('.png')} (or .npy, .npz)"
            )
        pairs.append((path, there[0]))

    def read(i: int) -> tuple[Tensor, Tensor]:
        picture, depth = pairs[i]
        return _same(
            read_picture(str(picture)), read_depth(depth, config.depth_unit), picture, depth
        )

    return Pictures(read, len(pairs))


def read_depth(path: Path, unit: float) -> Tensor:
    """A depth map (H, W) in metres; 0 is no depth.

    Args:
        path: a picture of one channel of 16 or 32 bits, or an array (of an .npz, the first).
        unit: metres of the value 1.
    Raises:
        CorruptImage: the file is no map, or has negative values.
    """
    from PIL import Image

    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                values = np.array(image)
        else:
            values = np.load(path, allow_pickle=False)
            if not isinstance(values, np.ndarray):
                values = values[values.files[0]]
    except Exception as error:  # Pillow and NumPy raise errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptImage(f"{path} cannot be decoded ({reason})") from None
    if values.ndim != 2 or values.dtype.kind not in "uif":
        raise CorruptImage(
            f"{path} must be a depth map of one channel, got an array of shape {values.shape} and "
            f"type {values.dtype}"
        )
    metres = np.nan_to_num(values.astype(np.float32) * unit, nan=0.0, posinf=0.0, neginf=-1.0)
    if (metres < 0).any():
        raise CorruptImage(f"{path} has negative depths; 0 is no depth")
    return torch.from_numpy(metres)


def _same(image: Tensor, label: Tensor, picture: Any, path: Any) -> tuple[Tensor, Tensor]:
    """The pair. CorruptImage if the sizes differ."""
    if image.shape[1:] != label.shape:
        raise CorruptImage(
            f"{path} has {label.shape[0]}x{label.shape[1]} pixels, and {picture} has "
            f"{image.shape[1]}x{image.shape[2]}"
        )
    return image, label


def _compose(config: DataConfig) -> None:
    """Write the composed pictures, unless the folder holds them."""
    folder = Path(str(config.path))
    counts = {config.train_split: config.pictures, config.val_split: max(1, config.pictures // 4)}
    mark, about = folder / "composed.txt", f"{counts}\n"
    if mark.is_file():
        if mark.read_text() != about:
            raise ConfigError(
                f"data.path={folder} holds other pictures ({mark.read_text().strip()}); choose "
                "another folder"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"data.path={folder} is not empty; choose a new folder")
    composed.write_maps(folder, counts, size=(112, 112), objects=(1, 3), sides=(40, 70))
    mark.write_text(about)


def _rooms(config: DataConfig) -> tuple[Pictures, Pictures]:
    """Composed rooms, which are drawn once for each process."""
    counts = config.pictures, max(1, config.pictures // 4)
    drawn = [
        [split.read(i) for i in range(count)]
        for split, count in zip((Rooms(False), Rooms(True)), counts, strict=True)
    ]
    known, held_out = (Pictures(rooms.__getitem__, len(rooms)) for rooms in drawn)
    return known, held_out


def _motorcycle() -> tuple[Pictures, Pictures]:
    """scikit-image's photograph of a motorcycle with measured depth, 2 to 5 metres."""
    try:
        from skimage.data import stereo_motorcycle
    except ImportError:
        raise ConfigError("data.source=motorcycle needs: pip install scikit-image") from None
    left, _, disparity = stereo_motorcycle()
    with np.errstate(invalid="ignore"):
        metres = MOTORCYCLE_MM[0] / (disparity + MOTORCYCLE_MM[1]) / 1000
    metres = np.nan_to_num(metres, nan=0.0, posinf=0.0).astype(np.float32)
    metres[~np.isfinite(disparity)] = 0
    image = tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(left)).permute(2, 0, 1))
    depth, half = torch.from_numpy(metres), left.shape[1] // 2
    parts = [(image[:, :, :half], depth[:, :half]), (image[:, :, half:], depth[:, half:])]
    return Pictures(lambda _: parts[0], 1), Pictures(lambda _: parts[1], 1)


class Crops(Dataset[Any]):
    """Random crops by (epoch, index): (normalised pixels, map)."""

    def __init__(
        self, pictures: Pictures, config: DataConfig, mean: Any, std: Any, seed: int
    ) -> None:
        self.pictures, self.config, self.seed = pictures, config, seed
        self.mean, self.std = list(mean), list(std)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        """The samples of a batch; an error of a file is returned, and the run raises it."""
        try:
            return [self[key] for key in keys]
        except (ConfigError, CorruptImage) as error:
            return [error]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        image, label = self.pictures.read(index % self.pictures.count)
        with keeping_random_state():
            seed_cpu(self.seed, epoch, index)
            return self._cropped(image, label)

    def _cropped(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        side, config = self.config.image_size, self.config
        top, left, height, width = self._place(image, label)
        image = F.resized_crop(
            image, top, left, height, width, [side, side],
            v2.InterpolationMode.BILINEAR, antialias=True,
        )  # fmt: skip
        label = F.resized_crop(
            tv_tensors.Mask(label), top, left, height, width, [side, side],
            v2.InterpolationMode.NEAREST,
        )  # fmt: skip
        if torch.rand(()).item() < config.hflip:
            image, label = image.flip(-1), label.flip(-1)
        if config.distortion:
            image = _distorted(image)
        return normalised(image, self.mean, self.std), torch.as_tensor(label)

    def _place(self, image: Tensor, label: Tensor) -> tuple[int, int, int, int]:
        """Top, left, height and width of the crop; `data.class_share` draws up to `TRIES`."""
        config = self.config
        box = _box(image, config.scale, config.ratio)
        if config.class_share == 1:
            return box
        for _ in range(TRIES - 1):
            top, left, height, width = box
            part = label[top : top + height, left : left + width]
            counts = part[part != IGNORED].long().bincount()
            if len(counts) and int(counts.max()) <= config.class_share * int(counts.sum()):
                break
            box = _box(image, config.scale, config.ratio)
        return box


def _distorted(image: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, each changed with probability 0.5."""
    ranges: list[dict[str, float]] = [
        {"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1}
    ]  # fmt: skip
    steps = [v2.RandomApply([v2.ColorJitter(**about)], 0.5) for about in ranges]
    changed: Tensor = v2.Compose(steps)(tv_tensors.Image(image))
    return changed


def _box(
    image: Tensor, scale: tuple[float, float], ratios: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop."""
    height, width = image.shape[1:]
    area = height * width * torch.empty(()).uniform_(*scale).item()
    ratio = math.exp(torch.empty(()).uniform_(*map(math.log, ratios)).item())
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    top = int(torch.randint(height - h + 1, ()))
    left = int(torch.randint(width - w + 1, ()))
    return top, left, h, w


def normalised(image: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 (3, H, W) to normalised float32 pixels; grey for a model of one channel."""
    pixels = F.to_dtype(torch.as_tensor(image), torch.float32, scale=True)
    if len(mean) == 1:
        pixels = F.rgb_to_grayscale(pixels)
    return F.normalize(pixels, mean, std)


def collate(samples: list[Any]) -> Any:
    """(images (N, C, S, S), maps (N, S, S)), or the first error."""
    error = next((s for s in samples if isinstance(s, Exception)), None)
    if error is not None:
        return error
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)
