"""Official checkpoints of MoCo v3, read without running code that they may contain.

A file holds `{"state_dict": weights, "epoch": ..., ...}` with keys that begin with `module.`. A
pre-training file has `base_encoder.`, `momentum_encoder.` and `predictor.`. A file of the linear
evaluation has the trunk and `head.weight`, `head.bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mesa_train.models.lit.official import check_weights
from mesa_train.models.lit.official import read_official as _read

from .encoder import EPS, MoCoViT
from .model import MoCo, classifier_name

_BASE, _MOMENTUM, _PREDICTOR = "base_encoder.", "momentum_encoder.", "predictor."


def read_official(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint file, on the CPU, without the prefix `module.`.

    Raises:
        ValueError: the file is no checkpoint, or holds objects other than tensors.
    """
    weights = _read(path, entry="state_dict")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def load_official(
    model: nn.Module, path: str | Path, *, encoder: str = "base", heads: int = 12
) -> None:
    """Load an official checkpoint.

    Args:
        model: a `MoCo`, which gets everything; or a timm model, which gets the trunk. A timm model
            also gets the classifier of a linear evaluation with as many classes; otherwise it keeps
            its own.
        path: of the file.
        encoder: "base" or "momentum": the trunk that a timm model gets; default "base".
        heads: attention heads of the checkpoint's ViT; default 12, as in all official ViTs. The
            shapes of the weights do not tell.
    Raises:
        ValueError: names keys that are missing, unexpected or of another shape; or the ViT has
            another number of heads, another eps or another pooling, so that the weights would load
            but give other features. The model is then unchanged.
    """
    if encoder not in ("base", "momentum"):
        raise ValueError(f"encoder must be one of base, momentum, got {encoder!r}")
    weights = read_official(path)
    _check_vit(model.base_encoder if isinstance(model, MoCo) else model, heads)
    _load(model, weights, encoder, path)


def load_encoder(
    model: nn.Module, path: str | Path, *, name: str = "", encoder: str = "base"
) -> None:
    """Load the trunk of a run of recipes/mocov3, or of an official checkpoint.

    Args:
        model: a timm model. It keeps its classifier, unless the file has one of the same shape.
        path: `encoder.safetensors` of a run, `model.safetensors` of its checkpoint, or an official
            file.
        name: of the model; the name that `encoder.safetensors` states must be the same; default:
            not checked.
        encoder: "base" or "momentum": the trunk that is taken of a file with both; default "base".
    Raises:
        ValueError: as for `load_official`; or the file is of a model of another name. The model is
            then unchanged.
        OSError: the file cannot be read.
    """
    if Path(path).suffix != ".safetensors":
        load_official(model, path, encoder=encoder)
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None
    of = about.get("model", name)
    if name and of != name:
        # Weights of another number of heads have the same shapes.
        raise ValueError(f"{path} is of {of}, not of {name}")
    _load(model, weights, encoder, path)


def _load(model: nn.Module, weights: Mapping[str, Tensor], encoder: str, path: str | Path) -> None:
    """Load the weights of a file into a `MoCo`, or their trunk into a timm model."""
    own = model.state_dict()
    loaded = dict(weights) if isinstance(model, MoCo) else _trunk(weights, model, encoder, path)
    for key, value in own.items():
        if key.endswith("pos_embed") and key in loaded and loaded[key].shape != value.shape:
            loaded[key] = _positions(model, loaded[key], value)
    check_weights(path, loaded, model)
    model.load_state_dict(loaded)


def _positions(model: Any, found: Tensor, own: Tensor) -> Tensor:
    """Positions for another image size: the fixed table of its grid, or learned ones resampled."""
    if isinstance(model, MoCo | MoCoViT) or found.ndim != 3 or found.shape[2] != own.shape[2]:
        return own
    return resample_abs_pos_embed(
        found, list(model.patch_embed.grid_size), num_prefix_tokens=model.num_prefix_tokens
    )


def _trunk(
    weights: Mapping[str, Tensor], model: nn.Module, encoder: str, path: str | Path
) -> dict[str, Tensor]:
    """The weights of a timm model: the trunk of a file, and the classifier."""
    prefix, head = _BASE if encoder == "base" else _MOMENTUM, f"{classifier_name(model)}."
    if any(key.startswith(prefix) for key in weights):
        trunk = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        trunk = {k: v for k, v in trunk.items() if not k.startswith(head)}
    elif encoder == "base":
        trunk = dict(weights)
    else:
        raise ValueError(f"{path} has no momentum encoder")
    heads = {k: v for k, v in model.state_dict().items() if k.startswith(head)}
    fits = all(k in trunk and trunk[k].shape == v.shape for k, v in heads.items())
    if not (heads and fits):
        trunk = {k: v for k, v in trunk.items() if not k.startswith(head)} | heads
    return trunk


def _check_vit(model: nn.Module, heads: int) -> None:
    """Refuse a ViT that would take the weights and give other features."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential) or not hasattr(blocks[0], "attn"):
        return
    found = int(blocks[0].attn.num_heads)  # type: ignore[arg-type, union-attr]
    if found != heads:
        raise ValueError(
            f"the model has {found} attention heads and the checkpoint's has {heads}; the weights "
            "would load and give other features (moco_vit_small has 12)"
        )
    eps = getattr(getattr(model, "norm", None), "eps", EPS)
    if eps != EPS:
        raise ValueError(f"the model's LayerNorm has eps {eps:g}, and the checkpoint's {EPS:g}")
    pool = getattr(model, "global_pool", "token")
    if pool != "token":
        raise ValueError(
            f"the model pools by {pool!r}, and the checkpoint's takes the class token: "
            "create it with global_pool='token'"
        )
