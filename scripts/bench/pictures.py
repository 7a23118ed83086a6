"""Trained model and input images for the scripts that draw pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mesa_train.training.classification import fit as recipe
from mesa_train.training.classification.config import Config, of_dict
from mesa_train.training.classification.dry_run import build_model
from mesa_train.training.config_schema import ConfigError, changed
from mesa_train.training.data import sources
from mesa_train.training.data.decode import decode


def built(
    run: Path | None, name: str, weights: Path | None, image_size: int | None
) -> tuple[Config, Any]:
    """(configuration, model) of a run's best weights, or of a model by name."""
    changes = [f"data.image_size={image_size}"] if image_size else []
    if run is not None:
        settings = recipe.load_run(run, changes)
        weights = weights or run / "best.safetensors"
        classes = sources.load(settings.data, settings.model.classes).classes
    else:
        classes = 1000
        fields = {"model": {"name": name, "classes": classes}, "data": {"crop": False}}
        settings = of_dict(changed(fields, changes))
    network = build_model(settings, classes).eval()
    if weights is not None:
        recipe.start_from(network, weights)
    return settings, network


def load_images(settings: Config, image: Path | None, count: int) -> Tensor:
    """Normalised images (N, 3, size, size)."""
    _, transform = sources.transforms(settings.data, settings.augment)
    if image is None:
        data = sources.load(settings.data, settings.model.classes)
        samples = sources.Samples(
            data.val, transform, settings.data.image_size, 0, "raise", replace=False
        )
        return torch.stack([samples[0, 7 * index][0] for index in range(count)])
    if not image.is_file():
        raise ConfigError(f"--image: no such file {image}")
    try:
        picture = decode(str(image))
    except Exception as error:  # Pillow's plugins raise errors of many types
        raise ConfigError(f"--image: {image} cannot be decoded ({error})") from None
    return transform(picture)[None]
