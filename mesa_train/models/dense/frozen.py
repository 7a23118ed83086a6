"""Frozen parts of a backbone: its first stages, and its batch norms.

Frozen stages have no trained parameters and stay in evaluation mode: `PyramidBackbone.train` leaves
them there. A frozen batch norm is an affine map with fixed numbers. Neither saves anything for the
backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from timm.models._features import FeatureDictNet, FeatureGetterNet
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from .bodies import SelectedMaps

# Marks a module that stays in evaluation mode.
_MARK = "is_frozen"
_STEMS = ("embeddings", "embedder", "stem", "patch_embed")


def freeze_stages(body: nn.Module, count: int) -> None:
    """Freeze the first stages of a backbone, in place.

    Args:
        body: of timm's `features_only=True`, of Hugging Face's `AutoBackbone`, of this package, or a
            `PlainViT`, which has a stem alone.
        count: of stages. The first is the stem, the modules before the map of stride 4; 2 freezes
            the stem and the stage of stride 4, as ORE and Detectron2.
    Raises:
        ValueError: the backbone has fewer stages, or they cannot be told apart.
    """
    if count == 0:
        return
    model, names = _stages(body)
    if not 0 <= count <= len(names):
        raise ValueError(
            f"frozen_stages must be from 0 to {len(names)} for this backbone, got {count}"
        )
    for name in (name for stage in names[:count] for name in stage):
        part = model
        for piece in name.split("."):
            part = getattr(part, piece)
        if isinstance(part, nn.Parameter):
            part.requires_grad_(False)
        else:
            part.requires_grad_(False)
            part.eval()
            setattr(part, _MARK, True)


def freeze_batch_norms(body: nn.Module) -> nn.Module:
    """Replace the batch norms of a backbone by affine maps of their statistics and weights.

    The keys of the state dict stay, but for `num_batches_tracked`, which is dropped.

    Returns:
        The backbone, changed in place unless it is itself a batch norm.
    """
    # timm's new modules take their numbers on the default device alone.
    with torch.device(next(body.parameters()).device):
        return cast(nn.Module, freeze_batch_norm_2d(body))


def keep_frozen(body: nn.Module) -> None:
    """Put the frozen stages back into evaluation mode."""
    for module in body.modules():
        if getattr(module, _MARK, False):
            module.eval()


def _stages(body: Any) -> tuple[Any, list[tuple[str, ...]]]:
    """The module with the stages, and the names of each stage's modules and parameters."""
    model = body.model if isinstance(body, SelectedMaps) else body
    info = getattr(model, "feature_info", None)
    if isinstance(model, FeatureGetterNet):
        model = model.model
    own: Any = getattr(model, "parts_by_stage", None)
    if own is not None:
        return model, list(own)
    if hasattr(info, "module_name"):
        return model, _of_timm(model, info)
    return model, _of_hugging_face(model)


def _of_timm(model: nn.Module, info: Any) -> list[tuple[str, ...]]:
    """Stages by the modules that give maps: each ends a stage, the stem ends before stride 4."""
    flat = isinstance(model, FeatureDictNet)
    ends = [
        name.replace(".", "_") if flat else name
        for name, stride in zip(info.module_name(), info.reduction(), strict=True)
        if stride >= 4
    ]
    stages: list[tuple[str, ...]] = []
    stage = [name for name, _ in model.named_parameters(recurse=False) if "pos_embed" in name]
    for name in _units(model, ends):
        if name == ends[0]:
            stages.append(tuple(stage))
            stage = []
        stage.append(name)
        if name in ends:
            stages.append(tuple(stage))
            stage = []
        if name == ends[-1]:
            break
    if len(stages) != len(ends) + 1:
        raise ValueError(f"frozen_stages: the stages of {type(model).__name__} are not known")
    return stages


def _units(model: nn.Module, ends: list[str], prefix: str = "") -> Iterator[str]:
    """Names of modules in order, each as large as possible without a part that ends a stage."""
    for name, child in model.named_children():
        full = prefix + name
        if any(end.startswith(f"{full}.") for end in ends):
            yield from _units(child, ends, f"{full}.")
        else:
            yield full


def _of_hugging_face(model: Any) -> list[tuple[str, ...]]:
    """The embedding, and the entries of the encoder's list, of the model or of its only trunk."""
    for prefix, trunk in (("", model), *((f"{name}.", x) for name, x in model.named_children())):
        stem = next((name for name in _STEMS if hasattr(trunk, name)), None)
        encoder = getattr(trunk, "encoder", None)
        lists = [name for name in ("stages", "layers") if hasattr(encoder, name)]
        if stem is not None and lists:
            count = len(getattr(encoder, lists[0]))
            names = [stem, *(f"encoder.{lists[0]}.{index}" for index in range(count))]
            return [(prefix + name,) for name in names]
    raise ValueError(f"frozen_stages: the stages of {type(model).__name__} are not known")
