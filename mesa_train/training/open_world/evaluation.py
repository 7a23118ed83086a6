"""Evaluate the weights of a finished run, and draw detections on any pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mesa_train.models.open_world import OpenWorldRCNN
from mesa_train.training import checkpoints
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.dense.loader import read_picture
from mesa_train.training.dense.voc import EXTENSIONS

from . import fit, pictures
from .build import build
from .config import Config


def scores(config: Config, weights: Path, *, energy: str = "kept") -> dict[str, Any]:
    """The metrics of a run's weights on its test pictures.

    Args:
        config: of the run.
        weights: its `model.safetensors`.
        energy: "kept" (default): the decision in the weights; "off": none.
    Returns:
        The columns of `OpenWorldResult.row`.
    Raises:
        ConfigError: the data or the weights do not fit the configuration.
    """
    _check(weights)
    run = fit.prepare(config)
    checkpoints.load_weights(run.model, weights)
    run.enter(run.stages[-1])
    # `enter` turns the decision off.
    checkpoints.load_weights(run.model, weights)
    if energy == "off":
        run.model.heads.identifier.set("off")
    return run.score(run.detect()).row()


def draw_folder(
    config: Config, weights: Path, folder: Path, out: Path, *, energy: str = "kept"
) -> int:
    """Draw known and unknown boxes on the pictures of a folder.

    Args:
        config: of the run; its data are not read.
        weights: its `model.safetensors`, which has the classes' names.
        folder: pictures.
        out: folder of the drawn pictures; created if missing.
        energy: as in `scores`.
    Returns:
        The number of pictures.
    Raises:
        ConfigError: there is no picture.
    """
    model, names = load(config, weights)
    if energy == "off":
        model.heads.identifier.set("off")
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in EXTENSIONS)
    if not found:
        raise ConfigError(f"--pictures: {folder} holds no picture")
    out.mkdir(parents=True, exist_ok=True)
    for path in found:
        image = read_picture(str(path)).as_subclass(torch.Tensor)
        with torch.no_grad():
            output = model([image.float() / 255])[0]
        drawn = output["scores"] >= pictures.LEAST_SCORE
        boxes, labels = output["boxes"][drawn], output["labels"][drawn].tolist()
        marked = pictures.marked(image, boxes, labels, names, model.seen)
        pictures.save_one(marked, out / f"{path.stem}.png")
    return len(found)


def load(config: Config, weights: Path) -> tuple[OpenWorldRCNN, list[str]]:
    """The model of a run's weights, in evaluation mode, and the classes' names."""
    from safetensors import safe_open

    _check(weights)
    with safe_open(weights, "pt") as file:
        names = (file.metadata() or {}).get("names", "").split("\n")
    model = build(config, len(names))
    checkpoints.load_weights(model, weights)
    return model.eval(), names


def _check(weights: Path) -> None:
    if not weights.is_file():
        raise ConfigError(f"--weights: no such file {weights}")
