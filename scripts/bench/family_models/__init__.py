"""Models of the families that people train: the real architecture in a small configuration.

Each module here has one source of models, and adds its cases to `CASES`. Weights are random. Inputs
have the kind and the shapes of the real task: patches of several image sizes, clips, volumes,
boxes, captions, noise levels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

# Builds the module and its inputs. The module returns a loss, or outputs that are weighted.
Make = Callable[[], tuple[nn.Module, Any]]


class Case(NamedTuple):
    """One model of a family.

    Args:
        group: the family.
        make: builds the model and its inputs.
        lora: regular expression or endings of the Linears that get adapters; None if such models
            are tuned as a whole.
    """

    group: str
    make: Make
    lora: str | tuple[str, ...] | None = None


CASES: dict[str, Case] = {}
# One module for each library; a library that is not installed leaves its cases out.
SOURCES = {
    "encoders": "transformers",
    "video": "transformers",
    "dense": "transformers",
    "language": "transformers",
    "policies": "transformers",
    "towers": "open_clip",
    "diffusion": "diffusers",
    "medical": "monai",
    "detectors": "torchvision",
    "images": "timm",
    "sequences": "timm",
    "distillation": "timm",
}


def case(
    name: str, group: str, lora: str | tuple[str, ...] | None = None
) -> Callable[[Make], Make]:
    """Add a function to `CASES`."""

    def add(make: Make) -> Make:
        CASES[name] = Case(group, make, lora)
        return make

    return add


def load(sources: Iterable[str] = SOURCES) -> tuple[dict[str, Case], list[str]]:
    """Return (all cases by name, the sources that could not be imported, each with the reason)."""
    missing = []
    for source in sources:
        try:
            importlib.import_module(SOURCES[source])
        except ImportError as error:
            missing.append(f"{source}: {error}")
            continue
        importlib.import_module(f"{__name__}.{source}")
    return CASES, missing
