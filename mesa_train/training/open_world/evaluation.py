"""Evaluate the weights of a finished run, and draw detections on any pictures."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from mesa_train.models.open_world import OpenWorldRCNN
from mesa_train.models.open_world.energy import MODES
from mesa_train.training import checkpoints
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.dense.loader import read_picture
from mesa_train.training.dense.voc import EXTENSIONS

from . import fit, pictures
from .build import build
from .config import Config
from .run import OpenWorldRun

ENERGIES = ("kept", *MODES, "transductive")
_log = logging.getLogger(__name__)


def scores(config: Config, weights: Path, *, energy: str = "kept") -> dict[str, Any]:
    """The metrics of a run's weights on its test pictures.

    Args:
        config: of the run.
        weights: its `model.safetensors`.
        energy: see `restored`; default "kept".
    Returns:
        The columns of `OpenWorldResult.row`.
    Raises:
        ConfigError: the data or the weights do not fit the configuration, or the energies cannot be
            fitted.
    """
    run = restored(config, weights, energy=energy)
    return run.score(run.detect()).row()


def restored(config: Config, weights: Path, *, energy: str = "kept") -> OpenWorldRun:
    """A finished run, in its last stage, with its weights and a decision by energies.

    Args:
        config: of the run.
        weights: its `model.safetensors`.
        energy: "kept" (default): the decision in the weights; "off": none; "known_tail",
            "two_fits", or "transductive" (two fits with annotated unknown objects): fitted anew, on
            the pictures that the run held out. A run of `method.energy=off` held out none, so they
            are training pictures; a warning says so.
    Raises:
        ConfigError: as `scores`.
    """
    _check(weights, energy)
    fits = energy not in ("kept", "off")
    run = fit.prepare(_fitting(config, energy) if fits else config)
    run.enter(run.stages[-1])
    # `enter` turns the decision off.
    checkpoints.load_weights(run.model, weights)
    if energy != "kept":
        run.model.heads.identifier.set("off")
    if fits and not run.fit_energies():
        raise ConfigError(f"--energy {energy}: too few regions of the pictures match; see above")
    return run


def _fitting(config: Config, energy: str) -> Config:
    """The configuration with another decision by energies."""
    method, data = config.method, config.data
    if method.energy == "off" and data.fit is None and data.format != "digits":
        _log.warning("the run held out no pictures: energies are fitted on training pictures")
    two = energy in ("two_fits", "transductive")
    transductive = energy == "transductive" or (two and method.transductive)
    mode = "two_fits" if two else energy
    method = dataclasses.replace(method, energy=mode, transductive=transductive)
    return dataclasses.replace(config, method=method)


def draw_folder(
    config: Config, weights: Path, folder: Path, out: Path, *, energy: str = "kept"
) -> int:
    """Draw known and unknown boxes on the pictures of a folder.

    Args:
        config: of the run; its data are read for a new fit of energies alone.
        weights: its `model.safetensors`, which has the classes' names.
        folder: pictures.
        out: folder of the drawn pictures; created if missing.
        energy: see `restored`.
    Returns:
        The number of pictures.
    Raises:
        ConfigError: there is no picture, or as `scores`.
    """
    _check(weights, energy)
    model, names = load(config, weights)
    if energy == "off":
        model.heads.identifier.set("off")
    elif energy != "kept":
        fitted = restored(config, weights, energy=energy).model.heads.identifier
        model.heads.identifier.load_state_dict(fitted.state_dict())
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

    _check(weights, "kept")
    with safe_open(weights, "pt") as file:
        names = (file.metadata() or {}).get("names", "").split("\n")
    model = build(config, len(names))
    checkpoints.load_weights(model, weights)
    return model.eval(), names


def _check(weights: Path, energy: str) -> None:
    if energy not in ENERGIES:
        raise ConfigError(f"--energy must be one of {', '.join(ENERGIES)}, got {energy!r}")
    if not weights.is_file():
        raise ConfigError(f"--weights: no such file {weights}")
