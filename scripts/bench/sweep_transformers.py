"""Sweep of transformers: every vision model, made small; outputs, gradients and saved bytes.

The script compares each policy with plain PyTorch. The configurations are each model's own, with
two layers a stage, small images and few queries. Weights are random, the batch is 2, the dtype
float32. One row for each model and task goes to docs/results/sweep_transformers.jsonl. A second run
continues after the last row.

    python scripts/bench/sweep_transformers.py
    python scripts/bench/sweep_transformers.py --models vit,segformer --again
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from sweeping import Make, sweep_makers
from torch import nn
from transformers.models.auto import modeling_auto

_log = logging.getLogger(__name__)
RESULTS = Path(__file__).resolve().parents[2] / "docs/results/sweep_transformers.jsonl"
# Table of models, by the name of the auto class.
TASKS = {
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForUniversalSegmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForObjectDetection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "AutoModelForDepthEstimation": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "AutoModelForMaskedImageModeling": "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES",
    "AutoModelForVideoClassification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForImageToImage": "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING_NAMES",
    "AutoBackbone": "MODEL_FOR_BACKBONE_MAPPING_NAMES",
    "AutoModel": "MODEL_FOR_IMAGE_MAPPING_NAMES",
}
# Values that make a model small, by the configuration's field.
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_queries": 20,
    "image_size": 64,
    "num_frames": 4,
    "use_pretrained_backbone": False,
}
# Fields of layers: a head may read the outputs of certain layers, more than two.
LAYERS = ("num_hidden_layers", "encoder_layers", "decoder_layers")
# Models for videos in a task for images.
VIDEOS = ("videomt",)
LARGEST = 130_000_000  # parameters


def main(
    models: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    seconds: Annotated[int, typer.Option(min=1, help="Limit per model.")] = 90,
    again: Annotated[bool, typer.Option("--again", help="Repeat models with a row.")] = False,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Compare every model with the first task that it has."""
    transformers.utils.logging.set_verbosity_error()
    all_kinds = dict(kinds())
    selected = [m.strip() for m in models.split(",") if m.strip()] or list(all_kinds)
    unknown = sorted(set(selected) - set(all_kinds))
    if unknown:
        raise SystemExit(f"sweep_transformers: no vision model {', '.join(unknown)}")
    makers: list[tuple[str, Make]] = [
        (n, functools.partial(small, n, all_kinds[n])) for n in selected
    ]
    sweep_makers(makers, out, seconds, again)


def kinds() -> Iterator[tuple[str, str]]:
    """(kind of model, its auto class), each kind once."""
    seen = set()
    for auto, table in TASKS.items():
        for kind in getattr(modeling_auto, table, {}):
            if kind not in seen and kind != "timm_wrapper":
                seen.add(kind)
                yield kind, auto


def small(kind: str, auto: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small model of a kind, and a batch of images for it.

    Raises:
        ValueError: no model of the kind has at most LARGEST parameters.
    """
    # Some models cannot run on the meta device; they get small layers and images of their own size.
    config_and_shape = _shrunk(kind, auto, ("image_size",))
    for unchanged in ((), ("image_size",), LAYERS):
        config, shape = _shrunk(kind, auto, unchanged)
        try:
            with torch.device("meta"):
                model = getattr(transformers, auto).from_config(config)
                model(**{_images(model): torch.empty(shape)})
        except Exception as error:  # each model raises its own type of error
            _log.debug("%s with %s of its own: %s", kind, unchanged or "nothing", error)
            continue
        config_and_shape = config, shape
        break
    config, shape = config_and_shape
    with torch.device("meta"):
        size = sum(p.numel() for p in getattr(transformers, auto).from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{kind} has {size:,} parameters")
    model = getattr(transformers, auto).from_config(config)
    return model, {_images(model): torch.randn(shape)}


def _shrunk(kind: str, auto: str, unchanged: tuple[str, ...]) -> tuple[Any, tuple[int, ...]]:
    """(configuration, shape of images or videos). Fields in `unchanged` keep the model's values."""
    config = shrunk(
        transformers.AutoConfig.for_model(kind),
        {k: v for k, v in SMALL.items() if k not in unchanged},
    )
    size = getattr(config, "image_size", None) or 64
    sides = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    if auto == "AutoModelForVideoClassification" or kind in VIDEOS:
        frames = (
            getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None) or 4
        )
        return config, (2, frames, 3, *sides)
    return config, (2, getattr(config, "num_channels", None) or 3, *sides)


def _images(model: nn.Module) -> str:
    """The name of the argument for images or videos."""
    takes = inspect.signature(model.forward).parameters
    return "pixel_values_videos" if "pixel_values_videos" in takes else "pixel_values"


def shrunk(config: Any, fields: dict[str, Any]) -> Any:
    """The configuration with small values in all fields that it has, also in its parts."""
    config.architectures = []  # an auto class of DeiT reads this list
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            shrunk(value, fields)
        elif name == "depths" and isinstance(value, (list, tuple)):
            setattr(config, name, type(value)([1] * len(value)))
    for name, value in fields.items():
        old = getattr(config, name, None)
        if isinstance(old, (int, bool)) and name in config.to_dict():
            setattr(config, name, type(old)(min(value, old)) if old else old)
    stages, layers = (
        getattr(config, "stage_names", None),
        getattr(config, "num_hidden_layers", None),
    )
    if stages and layers and len(stages) > layers + 1:
        # The last stage of a backbone must be one of the remaining stages.
        config.stage_names = stages[: layers + 1]
        config._out_features, config._out_indices = config.stage_names[-1:], [layers]
    return config


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
