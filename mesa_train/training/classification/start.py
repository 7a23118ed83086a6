"""The weights that a classification run starts from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from mesa_train.training import checkpoints
from mesa_train.training.config_schema import ConfigError

_log = logging.getLogger(__name__)


def start_from(
    model: nn.Module,
    path: Path,
    allow_config: bool = False,
    adjust: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Load weights to fine-tune. A head of other classes is not loaded; all other keys must fit.

    Args:
        model: the model.
        path: of the file.
        allow_config: let a .pth carry its trainer's configuration; default false.
        adjust: changes the file's weights before they are adapted to the model; default: none.
    Raises:
        ConfigError: the file cannot be read.
        CheckpointError: keys or shapes differ.
    """
    from safetensors.torch import load_file

    from mesa_train.models.lit.official import adapted, read_official

    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = read_official(path, allow_config=allow_config)
    except Exception as error:
        raise ConfigError(f"model.weights: {' '.join(str(error).split())}") from None
    own = model.state_dict()
    weights = adapted(adjust(found) if adjust else found, model)
    heads = [key for key in own if key.startswith(("head.", "aux_head."))]
    if any(key in weights and weights[key].shape != own[key].shape for key in heads):
        _log.warning("%s has a head of other classes; it starts anew", path)
        weights |= {key: own[key] for key in heads}
    checkpoints.check_keys(
        path, {k: v.shape for k, v in weights.items()}, checkpoints.shapes(model)
    )
    model.load_state_dict(weights)
