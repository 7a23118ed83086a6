"""Official checkpoints of this package's models, read without running code that they may contain.

The files hold `{"model": weights, ...}` or only the weights. The files of the authors' trainers
also hold a configuration in the same pickle: a yacs object (LIT) or an argparse namespace (HVT,
DynamicViT, EcoFormer, SPViT). This reader unpickles only tensors and plain containers. With
`allow_config` it also reads those two classes as plain dictionaries, and drops them.

A model with a method `adapt_checkpoint(weights)` changes the weights of a file to its own keys and
shapes before they are loaded.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .lit_ti import LITTi, resize_positions
from .litv1 import resize_biases

_HEADS = ("head.", "aux_head.")
_CONFIGS = ("yacs.config.CfgNode", "argparse.Namespace")


class _Config:
    """Replaces a class of `_CONFIGS`: the entries of a configuration, without the class's code."""

    def __new__(cls) -> Any:
        # The weights-only unpickler fills exactly this type.
        return OrderedDict()


def read_official(
    path: str | Path, *, allow_config: bool = False, entry: str = "model"
) -> dict[str, Tensor]:
    """Read the weights of a checkpoint file, on the CPU.

    Args:
        path: of the file.
        allow_config: accept the trainer's configuration in the file; default false.
        entry: the entry that holds the weights if the file holds more; default "model".
    Raises:
        ValueError: the file is no checkpoint, or holds objects other than tensors. The message
            names the remedy if there is a safe one.
    """
    allowed: list[Any] = [(_Config, name) for name in _CONFIGS] if allow_config else []
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any([name in str(error) for name in _CONFIGS]) and not allow_config:
            raise ValueError(
                f"{path} has its trainer's configuration beside the weights; allow_config=True reads "
                "the configuration as plain data and drops it"
            ) from None
        raise ValueError(
            f"{path} is not a checkpoint, or has objects other than tensors, which are not loaded"
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is empty or not a checkpoint") from error
    weights = content.get(entry, content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    ):
        raise ValueError(f"{path} has no weights: expected a state dict, alone or under {entry!r}")
    return dict(weights)


def load_official(
    model: nn.Module, path: str | Path, *, allow_config: bool = False, head: bool = True
) -> None:
    """Load a checkpoint into a model of the same variant, for any image size.

    Args:
        model: the model.
        path: of the file.
        allow_config: accept the trainer's configuration in the file; default false.
        head: load the classifiers (`head`, and LV-ViT's `aux_head`); false keeps the model's own,
            for another number of classes.
    Raises:
        ValueError: names keys that are missing, unexpected or of another shape. The model is then
            unchanged.
    """
    weights = adapted(read_official(path, allow_config=allow_config), model)
    model_weights = model.state_dict()
    if not head:
        weights = {key: value for key, value in weights.items() if not key.startswith(_HEADS)}
        weights |= {key: value for key, value in model_weights.items() if key.startswith(_HEADS)}
    check_weights(path, weights, model)
    model.load_state_dict(weights)


def check_weights(path: str | Path, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check that weights have the keys and shapes of a model's.

    Args:
        path: of their file, for the message.
        weights: by key.
        model: the model.
    Raises:
        ValueError: names keys that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    problems = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": [
            f"{key} {tuple(weights[key].shape)} for {tuple(value.shape)}"
            for key, value in own.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    descriptions = [
        f"{kind}: {', '.join(keys[:4])}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        for kind, keys in problems.items()
        if keys
    ]
    if descriptions:
        raise ValueError(
            f"{path} is of another model than {type(model).__name__}; {'; '.join(descriptions)}"
        )


def adapted(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights for the keys and the image size of `model`.

    Position biases and embeddings of another image size are interpolated.
    """
    adapt = getattr(model, "adapt_checkpoint", None)
    if adapt is not None:
        return adapt(weights)
    if isinstance(model, LITTi):
        return resize_positions(weights, model)
    return resize_biases(weights, model)
