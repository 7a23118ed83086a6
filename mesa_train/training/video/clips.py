"""Clips with labels: folders of frames, video files, or digits that move.

The frames of all clips are one list of images, so that their features are cached like those of any
images: frame t of clip i is image i * frames + t.
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

from mesa_train.training.config_schema import ConfigError
from mesa_train.training.data import packaged
from mesa_train.training.evaluation.suite.frozen import to_rgb
from mesa_train.training.evaluation.suite.images import Images, image_of, stamp

from .config import DataConfig

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
# Canvas of a moving digit, and its way between the first and the last frame, in pixels.
CANVAS, WAY = 56, 24


@dataclass(frozen=True)
class Clips:
    """Clips with labels.

    Attributes:
        frames: the frames of all clips.
        labels: (clips,).
        classes: names.
    """

    frames: Images
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def load(config: DataConfig) -> tuple[Clips, Clips]:
    """Training and held-out clips.

    Raises:
        ConfigError: a folder is missing or empty, or the splits have other classes.
    """
    if config.source == "moving_digits":
        held_out = max(1, config.clips // 4)
        return moving_digits(config.clips, config.frames, False), moving_digits(
            held_out, config.frames, True
        )
    root = Path(str(config.path))
    train, classes = _split(root / config.train_split, config.frames, None)
    test, _ = _split(root / config.val_split, config.frames, classes)
    return train, test


def moving_digits(count: int, frames: int, held_out: bool) -> Clips:
    """MNIST digits that cross a canvas in one of eight directions.

    Digits are real, their motion is composed. The label is the direction, which no single frame
    shows. Clip i depends on i and the split alone.
    """
    found = packaged.load("mnist5k")
    split = found.held_out if held_out else found.train
    digits = split.images.squeeze(1).numpy()
    labels = torch.arange(count) % len(DIRECTIONS)

    def read(number: int) -> Any:
        clip, t = divmod(number, frames)
        stream = np.random.default_rng((int(held_out), clip))
        digit = digits[int(stream.integers(len(digits)))]
        angle = int(labels[clip]) * math.pi / 4
        middle = (CANVAS - 28) / 2 + stream.uniform(-2, 2, 2)
        share = (t / (frames - 1) - 0.5) if frames > 1 else 0.0
        x, y = middle + WAY * share * np.array([math.cos(angle), math.sin(angle)])
        left, top = (int(np.clip(round(v), 0, CANVAS - 28)) for v in (x, y))
        canvas = np.zeros((CANVAS, CANVAS), np.uint8)
        canvas[top : top + 28, left : left + 28] = digit
        return to_rgb(canvas)

    name = f"moving_digits/{'held_out' if held_out else 'train'}/{frames}"
    return _clips(name, read, labels, DIRECTIONS, frames, "")


def _clips(
    name: str, read: Callable[[int], Any], labels: Tensor, classes: tuple[str, ...], frames: int,
    files: str,
) -> Clips:  # fmt: skip
    images = Images(name, read, labels.repeat_interleave(frames), classes, squash=True, stamp=files)
    return Clips(images, labels, classes)


def _split(
    folder: Path, frames: int, known: tuple[str, ...] | None
) -> tuple[Clips, tuple[str, ...]]:
    """The clips of a folder of class folders."""
    if not folder.is_dir():
        raise ConfigError(f"data.path: there is no folder {folder}")
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))
    classes = known or names
    strange = [name for name in names if name not in classes]
    if not names or strange:
        raise ConfigError(
            f"data.path: {folder} has {'no class folders' if not names else 'the class folder '}"
            f"{strange[0] + ', which the training split lacks' if strange else ''}"
        )
    clips: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        there = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        clips += [(p, label) for p in there if p.is_dir() or p.suffix.lower() in VIDEOS]
    if not clips:
        raise ConfigError(
            f"data.path: {folder} has no clips: folders of frames CLASS/CLIP/*.jpg, or files "
            f"CLASS/CLIP{VIDEOS[0]}"
        )
    chosen = [frames_of(path, frames) for path, _ in clips]

    def read(number: int) -> Any:
        clip, t = divmod(number, frames)
        return chosen[clip](t)

    labels = torch.tensor([label for _, label in clips])
    files = stamp([str(path) for path, _ in clips])
    return _clips(str(folder), read, labels, classes, frames, files), classes


def frames_of(path: Path, frames: int) -> Callable[[int], Any]:
    """The function from a frame's number to a PIL image in RGB.

    Args:
        path: folder of pictures, or a video file.
        frames: number of frames, at equal distances.
    Raises:
        ConfigError: the folder has no pictures.
    """
    if path.is_dir():
        pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
        if not pictures:
            raise ConfigError(f"data.path: the clip {path} has no pictures")
        rows = positions(len(pictures), frames)
        return lambda t: image_of(str(pictures[rows[t]]))
    known: list[Any] = []

    def read(t: int) -> Any:
        if t == 0 or not known:
            known[:] = _decoded(path)
        image = known[positions(len(known), frames)[t]]
        if t == frames - 1:
            known.clear()
        return image

    return read


def positions(length: int, frames: int) -> list[int]:
    """The middles of `frames` equal parts of a clip of `length` frames."""
    return [min(length - 1, int((t + 0.5) * length / frames)) for t in range(frames)]


def _decoded(path: Path) -> list[Any]:
    """All frames of a video file. ConfigError if it cannot be decoded."""
    try:
        import av
    except ImportError:
        raise ConfigError(f"{path} needs PyAV: pip install av; or folders of frames") from None
    try:
        with av.open(str(path)) as file:
            found = [frame.to_image().convert("RGB") for frame in file.decode(video=0)]
    except Exception as error:  # PyAV raises errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path} cannot be decoded ({reason})") from None
    if not found:
        raise ConfigError(f"{path} has no frames")
    return found
