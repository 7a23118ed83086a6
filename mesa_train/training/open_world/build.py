"""The detector and the optimizer of an open-world configuration."""

from __future__ import annotations

from typing import Any

import torch

from mesa_train.models.open_world import OpenWorldRCNN, open_world_rcnn
from mesa_train.training.config_schema import ConfigError
from mesa_train.training.dense.build import backbone_of

from .config import Config


def build(config: Config, classes: int) -> OpenWorldRCNN:
    """The model of a configuration, with weights from torch's global generator.

    Args:
        config: of the run.
        classes: of all tasks together.
    Raises:
        ConfigError: the backbone is unknown or has no maps.
    """
    model, data, test = config.model, config.data, config.test
    body = backbone_of(config)  # type: ignore[arg-type]
    try:
        detector = open_world_rcnn(
            body,
            classes,
            rules=config.method.open_world_rules(),
            min_size=data.short_side,
            max_size=data.long_side,
            box_dim=model.box_dim,
            channels=model.channels,
        )
    except ValueError as error:
        raise ConfigError(f"model.backbone={model.backbone}: {error}") from None
    # The loader has scaled training pictures already.
    detector.transform.scales_in_training = False
    heads: Any = detector.heads
    heads.clustering.deferred = True
    heads.fg_bg_sampler.batch_size_per_image = model.regions
    heads.score_thresh, heads.nms_thresh = test.score, test.nms
    heads.detections_per_img = test.detections
    rpn: Any = detector.rpn
    for name in ("_pre_nms_top_n", "_post_nms_top_n"):
        limits = getattr(rpn, name)
        setattr(rpn, name, {mode: min(most, model.proposals) for mode, most in limits.items()})
    return detector


def optimizer_of(config: Config, model: OpenWorldRCNN) -> torch.optim.Optimizer:
    """The optimizer of a configuration."""
    optim = config.optim
    trained = [p for p in model.parameters() if p.requires_grad]
    if optim.name == "adamw":
        return torch.optim.AdamW(trained, lr=optim.lr, weight_decay=optim.weight_decay)
    return torch.optim.SGD(trained, lr=optim.lr, momentum=0.9, weight_decay=optim.weight_decay)
