"""Models of the dense recipes: built from a configuration, and filled with weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from mesa_train.models.dense import faster_rcnn, mask_rcnn, retinanet, semantic_fpn
from mesa_train.models.dense.bodies import SelectedMaps
from mesa_train.models.dense.frozen import freeze_batch_norms, freeze_stages
from mesa_train.models.dense.named import is_plain, timm_body
from mesa_train.models.dense.official import from_official
from mesa_train.models.dense.plain_vit import PlainViT
from mesa_train.models.lit.lit_ti import LITTi
from mesa_train.models.lit.official import adapted, read_official
from mesa_train.models.lit.pyramid import PyramidFeatures
from mesa_train.training import checkpoints
from mesa_train.training.config_schema import ConfigError

from . import hugging_face
from .config import Config

_log = logging.getLogger(__name__)
_BUILDERS = {"retinanet": retinanet, "faster_rcnn": faster_rcnn, "mask_rcnn": mask_rcnn}


def model_of(config: Config, classes: int, device: str = "cpu") -> nn.Module:
    """The model of a configuration, with weights from torch's global generator.

    Args:
        config: of the run.
        classes: number of classes.
        device: default "cpu"; "meta" allocates nothing.
    Raises:
        ConfigError: the backbone is unknown or has no maps, or an option does not fit it.
    """
    model, data = config.model, config.data
    body = backbone_of(config, device, strides_of(model.kind))
    options: dict[str, Any] = {"channels": model.channels}
    if model.recompute_loss:
        options["recompute_loss"] = True
    try:
        with torch.device(device):
            if not model.detects:
                return semantic_fpn(body, classes, **options)
            options |= {"conventions": model.conventions}
            options |= {"min_size": data.short_side, "max_size": data.long_side}
            detector: Any = _BUILDERS[model.kind](body, classes, **options)
    except ValueError as error:
        raise ConfigError(f"model.backbone={model.backbone}: {error}") from None
    # The loader has scaled training images already.
    detector.transform.scales_in_training = False
    return detector


def strides_of(kind: str) -> tuple[int, ...]:
    """The strides of the backbone's maps that a model takes, in pixels."""
    return (8, 16, 32) if kind == "retinanet" else (4, 8, 16, 32)


def backbone_of(
    config: Config, device: str = "cpu", strides: Sequence[int] = (4, 8, 16, 32)
) -> nn.Module:
    """The backbone of a configuration.

    Args:
        config: of the run.
        device: default "cpu"; "meta" allocates nothing.
        strides: of its maps, in pixels; default 4 to 32.
    Raises:
        ConfigError: it is unknown, or an option does not fit it.
    """
    model = config.model
    try:
        if model.backbone.startswith(hugging_face.PREFIX):
            body = _of_hugging_face(model, device, strides)
        else:
            body = _of_timm(model, device)
        freeze_stages(body, model.frozen_stages)
        if model.freeze_batch_norm:
            body = freeze_batch_norms(body)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.backbone={model.backbone}: {reason}") from None
    return body


def _of_timm(model: Any, device: str) -> nn.Module:
    options: dict[str, Any] = {"pretrained": model.pretrained}
    if model.drop_path:
        options["drop_path_rate"] = model.drop_path
    if model.window and not is_plain(model.backbone):
        if not model.backbone.startswith("litv2"):
            raise ConfigError(
                f"model.window={model.window} is for litv2_* and plain ViTs, not {model.backbone}"
            )
        options["windows"] = (0, 0, model.window, 1)
    with torch.device(device):
        body: Any = timm_body(
            model.backbone,
            window=model.window or 14,
            global_blocks=model.global_blocks,
            **options,
        )
    if model.grad_checkpointing:
        turn_on = getattr(body, "set_grad_checkpointing", None)
        if turn_on is None:
            raise ConfigError(
                f"model.grad_checkpointing: {model.backbone} has none; a policy such as "
                "mesa8-recompute saves memory too"
            )
        turn_on()
    return body


def _of_hugging_face(model: Any, device: str, strides: Sequence[int]) -> nn.Module:
    if model.window:
        raise ConfigError(
            f"model.window={model.window} is for litv2_* and plain ViTs, not {model.backbone}"
        )
    body = hugging_face.build(
        model.backbone.removeprefix(hugging_face.PREFIX),
        strides,
        pretrained=model.pretrained,
        drop_path=model.drop_path,
        device=device,
    )
    if model.grad_checkpointing:
        hugging_face.checkpoint_blocks(body, model.backbone)
    return body


def start_from(model: Any, config: Config) -> None:
    """Load the weights of `model.weights`.

    A file of a whole model (the authors' or a run's) must fit the model. A file of a classifier fills
    the backbone; its head and its last norm are left out, and the norms of maps stay as they are.

    Raises:
        ConfigError: the file cannot be read.
        CheckpointError: keys or shapes differ.
    """
    path = Path(str(config.model.weights))
    weights = _read(path, config.model.allow_config)
    heads = ("neck.", "bbox_head.", "decode_head.", "rpn_head.")
    whole = any([key.startswith("backbone.body.") for key in weights])
    if not whole and any([key.startswith(heads) for key in weights]):
        background = "last" if config.model.conventions == "reference" else "first"
        try:
            weights, whole = from_official(weights, background=background), True
        except ValueError as error:
            raise ConfigError(f"model.weights: {path}: {error}") from None
    if whole:
        _check(path, weights, model)
        model.load_state_dict(weights)
        return
    body = model.backbone.body
    for wrapper in (SelectedMaps, FeatureGetterNet):
        if isinstance(body, wrapper):
            body = body.model
    own = body.state_dict()
    if isinstance(body, PyramidFeatures | LITTi):
        weights = adapted(weights, body)
    elif isinstance(body, PlainViT):
        weights = _of_plain_vit(weights, own)
    new = {f"norm{index}" for index in range(4)}
    head = ("norm.", "head.", "fc_norm.", "fc.", "classifier.")
    # A frozen batch norm counts no batches.
    counts = "num_batches_tracked"
    kept = {
        k: v
        for k, v in weights.items()
        if k in own or not (k.startswith(head) or k.endswith(counts))
    }
    kept |= {k: v for k, v in own.items() if k.split(".")[0] in new and k not in kept}
    _check(path, kept, body)
    body.load_state_dict(kept)
    _log.info("%s fills the backbone", path)


def _of_plain_vit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of timm's VisionTransformer for a PlainViT, which has no tokens but the patches'."""
    left_out = ("cls_token", "dist_token", "reg_token", "norm.", "head_dist.")
    found = {
        key.replace("patch_embed.proj.", "patch_embed."): value
        for key, value in weights.items()
        if not key.startswith(left_out)
    }
    if "pos_embed" in found:
        # The tokens come first.
        found["pos_embed"] = found["pos_embed"][:, -own["pos_embed"].shape[1] :]
    return found | {key: value for key, value in own.items() if key.startswith("norm.")}


def _read(path: Path, allow_config: bool) -> Mapping[str, Tensor]:
    """The weights of a file. ConfigError if it cannot be read."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            return read_official(path, allow_config=allow_config)
        except ValueError as error:
            if "has no weights" not in str(error):
                raise
            # mmdet's and mmseg's entry.
            return read_official(path, allow_config=allow_config, entry="state_dict")
    except Exception as error:
        raise ConfigError(f"model.weights: {' '.join(str(error).split())}") from None


def _check(path: Path, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    shapes = {key: value.shape for key, value in weights.items()}
    checkpoints.check_keys(path, shapes, checkpoints.shapes(model))
