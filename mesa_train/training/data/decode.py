"""Decoding of one picture of any mode to 8-bit RGB.

Pillow's `convert("RGB")` clips 16-bit and float pixels, so a 16-bit scan becomes white or black.
This file scales such pixels first. The rules depend on one picture alone:

- 16-bit integers (I;16, I;16B, I;16L; mode I with pixels in 0..65535): the upper 8 bits, `>> 8`, as
  in libpng, OpenCV and torchvision. 12-bit pixels in 16-bit files therefore stay dark.
- Other 32-bit integers (mode I): scaled from the picture's smallest and largest pixel.
- Floats (mode F): pixels in 0..1 are multiplied by 255. Pixels in 0..255 count as 8-bit. Pixels in
  0..65535 are divided by 257. All others are scaled from the picture's own range. NaN becomes the
  lower end of the range, infinities its ends.
- Alpha is dropped, as in torchvision's ImageFolder. Pillow converts palettes, CMYK, LAB, YCbCr,
  1-bit and grey pictures.

The picture is turned by its EXIF orientation. A damaged EXIF block is ignored. A file with several
frames gives the first one. 8-bit RGB costs one `convert`; 16-bit and float pictures cost a few
NumPy passes more.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112
# Pillow's operation for each EXIF orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(encoded: Any) -> Image.Image:
    """Decode a picture to upright 8-bit RGB.

    Args:
        encoded: a file's bytes, a path, or an array (H, W) or (H, W, 3).
    Raises:
        ValueError: there is no picture.
        Exception: any exception of Pillow or of the file system.
    """
    if encoded is None:
        raise ValueError("there is no picture, the cell is null")
    if isinstance(encoded, np.ndarray):
        return _rgb(Image.fromarray(encoded))
    with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
        # Load before `info` is read: some formats fill it while they load.
        image.load()
        turn, rgb = _turn(image), _rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The operation that makes a picture upright; None if there is none."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises errors of many types in Pillow
        return None


def _rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns if it drops a palette's transparency itself.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Convert integer or float pixels (H, W) to uint8, by the rules at the top of this file."""
    if np.issubdtype(pixels.dtype, np.integer):
        if pixels.min() >= 0 and pixels.max() <= 65535:
            return (pixels.astype(np.uint16) >> 8).astype(np.uint8)
        return _stretched(pixels.astype(np.float64))
    finite = pixels[np.isfinite(pixels)]
    if not finite.size:
        raise ValueError("no pixel is finite")
    low, high = float(finite.min()), float(finite.max())
    pixels = np.nan_to_num(pixels.astype(np.float64), nan=low, posinf=high, neginf=low)
    for largest, factor in ((1.0, 255.0), (255.0, 1.0), (65535.0, 1 / 257)):
        if low >= 0 and high <= largest:
            return np.rint(pixels * factor).astype(np.uint8)
    return _stretched(pixels)


def _stretched(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Scale the picture's own range to 0..255. A picture of one value becomes black."""
    low, high = pixels.min(), pixels.max()
    if high == low:
        return np.zeros(pixels.shape, np.uint8)
    # Halves first, because the range of float64's largest pixels would overflow.
    scaled = (pixels / 2 - low / 2) / (high / 2 - low / 2)
    return np.rint(scaled * 255).astype(np.uint8)
