"""Decode one picture of any mode to 8-bit RGB.

Pillow's `convert("RGB")` clips 16-bit and float pixels, so a 16-bit scan becomes white or black. This
file scales such pixels first, by rules that look at one picture alone:

- 16-bit integers (I;16, I;16B, I;16L; mode I whose pixels lie in 0..65535): the upper 8 bits, `>> 8`,
  as libpng, OpenCV and torchvision do. 12-bit pixels in 16-bit files therefore stay dark.
- other 32-bit integers (mode I): the picture's own range, from its least to its largest pixel.
- floats (mode F): pixels in 0..1 are multiplied by 255, pixels in 0..255 are taken as 8-bit, pixels in
  0..65535 are divided by 257, all others by the picture's own range. NaN becomes the range's lower
  end, infinities its ends.
- alpha is dropped, as torchvision's ImageFolder does; palettes, CMYK, LAB, YCbCr, 1-bit and grey
  pictures are converted by Pillow.

The picture is turned as its EXIF orientation says; a damaged EXIF block is ignored. Of a file with
several frames the first is taken. 8-bit RGB costs one `convert`; 16-bit and float pictures cost a
few NumPy passes more.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112
# EXIF orientation to Pillow's operation; 1 is upright.
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
    """An upright 8-bit RGB picture of a file's bytes, a path, or an array (H, W) or (H, W, 3).

    Raises any exception of Pillow or the file system; ValueError if there is no picture.
    """
    if encoded is None:
        raise ValueError("there is no picture, the cell is null")
    if isinstance(encoded, np.ndarray):
        return _rgb(Image.fromarray(encoded))
    with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
        # Before `info` is read: some formats fill it as they load.
        image.load()
        turn, rgb = _turn(image), _rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's readers of damaged EXIF raise errors of many types
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns if it has to drop a palette's transparency itself.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Integer or float pixels (H, W) as uint8, by the rules above."""
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
    """The picture's own range as 0..255; a picture of one value becomes black."""
    low, high = pixels.min(), pixels.max()
    if high == low:
        return np.zeros(pixels.shape, np.uint8)
    # Halves first: the range of float64's largest pixels would overflow.
    scaled = (pixels / 2 - low / 2) / (high / 2 - low / 2)
    return np.rint(scaled * 255).astype(np.uint8)
