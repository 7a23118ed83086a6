"""Masks as run lengths and polygons, by pycocotools.

pycocotools warns about its own use of NumPy; the warning is left out here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def encode(mask: NDArray[Any]) -> dict[str, Any]:
    """The run lengths of a mask (H, W), as in COCO's files: "size", and "counts" as text.

    Raises:
        ImportError: pycocotools is missing; names the extra.
    """
    with _coder() as coder:
        found = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def merged(segmentation: Any, height: int, width: int) -> Any:
    """pycocotools' run lengths of polygons, or of run lengths as a list or as text."""
    with _coder() as coder:
        if isinstance(segmentation, list):
            return coder.merge(coder.frPyObjects(segmentation, height, width))
        if isinstance(segmentation["counts"], list):
            return coder.frPyObjects(segmentation, height, width)
    return segmentation


def decode(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """The mask (H, W) of polygons or run lengths."""
    with _coder() as coder:
        mask: NDArray[np.uint8] = coder.decode(merged(segmentation, height, width))
    return mask


def lengths(text: str) -> list[int] | None:
    """The run lengths of a mask whose "counts" are text; None if the text is damaged.

    pycocotools decodes a damaged text without an error. A number has 5 bits a character, the lowest
    first. Bit 6 says that another character follows, and bit 5 of the last one is the sign. From the
    fourth number on, the difference to the number before the previous one is stored.
    """
    found: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        # pycocotools shifts a number of 64 bits.
        if not 0 <= bits < 64 or shift > 50:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        found.append(value + (found[-2] if len(found) > 2 else 0))
        value, shift = 0, 0
    return None if shift or min(found, default=0) < 0 else found


@contextlib.contextmanager
def _coder() -> Iterator[Any]:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "COCO's masks need pycocotools: pip install 'mesa_train[dense]'"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield mask
