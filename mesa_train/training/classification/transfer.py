"""Linear evaluation and fine-tuning of an encoder of MoCo v3, as training methods.

Both start from `model.weights`: `encoder.safetensors` or a checkpoint's `model.safetensors` of a run
of recipes/mocov3, or a file of the authors. The classifier is new.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.training.config_schema import ConfigError

from .method import Method


class _OfEncoder(Method):
    """A classification that starts from an encoder."""

    def check_files(self) -> None:
        if self.config.model.weights is None:
            raise ConfigError(
                f"model.weights is missing: method.name={self.method.name} starts from "
                "encoder.safetensors of a run of recipes/mocov3, or from a file of the authors"
            )

    def load(self, model: nn.Module, path: Path) -> None:
        from mesa_train.models.moco.official import load_encoder

        try:
            load_encoder(model, path, name=self.config.model.name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.weights: {' '.join(str(error).split())}") from None


class FineTuning(_OfEncoder):
    """All weights train: a frozen patch projection and fixed positions too, as in DeiT's code."""

    def built(self, model: nn.Module) -> None:
        model.requires_grad_(True)


class LinearEvaluation(_OfEncoder):
    """A Linear on a frozen encoder in eval mode. After each epoch the encoder must be the file's.

    The classifier's weights are drawn from N(0, 0.01), and its bias is 0. A classifier in the file
    is not loaded. The backward keeps nothing of the encoder.
    """

    _before: dict[str, str]

    def built(self, model: nn.Module) -> None:
        head = _head(model)
        model.requires_grad_(False)
        head.requires_grad_(True)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def load(self, model: nn.Module, path: Path) -> None:
        head = _head(model)
        drawn = [p.detach().clone() for p in head.parameters()]
        super().load(model, path)
        with torch.no_grad():
            for parameter, value in zip(head.parameters(), drawn, strict=True):
                parameter.copy_(value)

    def mode(self, model: nn.Module) -> None:
        model.eval()

    def prepared(self, run: Any) -> None:
        self._before = _digests(run.bare)

    def finish_epoch(self, run: Any) -> None:
        """Check the encoder.

        Raises:
            RuntimeError: a tensor beside the classifier has changed since the file was read.
        """
        now = _digests(run.bare)
        changed = [key for key, digest in self._before.items() if now.get(key) != digest]
        if changed:
            raise RuntimeError(
                f"linear evaluation: {len(changed)} of {len(now)} tensors of the frozen encoder "
                f"changed, among them {', '.join(changed[:3])}"
            )


def _head(model: nn.Module) -> nn.Linear:
    """The classifier. ConfigError if it is not one Linear."""
    from mesa_train.models.moco.model import classifier_name

    try:
        head = model.get_submodule(classifier_name(model))
    except ValueError as error:
        raise ConfigError(f"model.name: {error}") from None
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"model.name: {type(model).__name__} has no Linear classifier")
    return head


def _digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 by key of all parameters and buffers beside the classifier."""
    from mesa_train.models.moco.model import classifier_name

    head = f"{classifier_name(model)}."
    return {
        key: hashlib.sha256(_bytes(value)).hexdigest()
        for key, value in model.state_dict().items()
        if not key.startswith(head)
    }


def _bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any dtype."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
