"""Backbones of Hugging Face's transformers for the dense recipes: `hf:NAME`.

NAME is a folder with a `config.json`, a model type such as `swin`, or a name on a hub. The class is
the one of `AutoBackbone`. It gives the maps at the strides that the model needs and no others. Its
parameters that no map depends on are frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mesa_train.training.config_schema import ConfigError

PREFIX = "hf:"
_PROBE = 256


def build(
    name: str, strides: Sequence[int], *, pretrained: bool, drop_path: float, device: str = "cpu"
) -> nn.Module:
    """Build a backbone.

    Args:
        name: after the prefix.
        strides: of the maps, in pixels. If all maps of the model have one stride, the last is given.
        pretrained: read the weights of the folder or of the hub; else they are random.
        drop_path: highest drop path rate; 0 leaves the configuration's.
        device: default "cpu"; "meta" allocates nothing.
    Raises:
        ConfigError: transformers has no such backbone, or it has no map of a stride.
    """
    try:
        from transformers import AutoBackbone
        from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
    except ImportError as error:
        raise ImportError(
            f"model.backbone={PREFIX}{name} needs transformers: pip install transformers"
        ) from error

    config = _config(name)
    stages = list(config.stage_names)
    if drop_path:
        if not hasattr(config, "drop_path_rate"):
            raise ConfigError(
                f"model.drop_path={drop_path:g}: a {config.model_type} has none; set it to 0"
            )
        config.drop_path_rate = drop_path
    with _in_one_line(name):
        with torch.device("meta"):
            every = _strides(AutoBackbone.from_config(_giving(config, stages)), len(stages))
        # Of several maps of one stride, the last has seen most blocks.
        last = dict(zip(every, stages, strict=True))
        chosen = [last[stride] for stride in strides if stride in last]
        if len(last) == 1:
            chosen = [stages[-1]]
        elif len(chosen) < len(strides):
            missing = [stride for stride in strides if stride not in last]
            raise ValueError(f"it has maps at strides {sorted(last)}, not at {missing}")
        config = _giving(config, chosen)
        with torch.device("meta"):
            unused = _unused(AutoBackbone.from_config(config))
        with torch.device(device):
            if pretrained and device != "meta":
                kind = MODEL_FOR_BACKBONE_MAPPING[type(config)]
                body: Any = kind.from_pretrained(name, config=config)
            else:
                body = AutoBackbone.from_config(config)
    for name, parameter in body.named_parameters():
        # DistributedDataParallel refuses a parameter without a gradient.
        parameter.requires_grad_(parameter.requires_grad and name not in unused)
    backbone: nn.Module = body.train()
    return backbone


def checkpoint_blocks(body: Any, name: str) -> None:
    """Turn on activation checkpointing. ConfigError if the backbone has none."""
    if not getattr(body, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"model.grad_checkpointing: {name} has none; a policy such as mesa8-recompute saves "
            "memory too"
        )
    # The second is its name before transformers 5.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    turn_on = next(getattr(body, name) for name in names if hasattr(body, name))
    turn_on({"use_reentrant": False})


def _config(name: str) -> Any:
    """The configuration of a backbone."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    with _in_one_line(name):
        if name in CONFIG_MAPPING and not Path(name).exists():
            config = AutoConfig.for_model(name)
        else:
            config = AutoConfig.from_pretrained(name, local_files_only=Path(name).exists())
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        types = ", ".join(sorted(kind.model_type for kind in MODEL_FOR_BACKBONE_MAPPING))
        raise ConfigError(
            f"model.backbone: transformers has no backbone of type {config.model_type!r} "
            f"({PREFIX}{name}); it has {types}"
        )
    return config


def _giving(config: Any, stages: list[str]) -> Any:
    """The configuration with the maps of these stages."""
    values = config.to_dict()
    for name in ("out_indices", "_out_indices", "_out_features"):
        values.pop(name, None)
    return type(config).from_dict(values | {"out_features": stages})


def _unused(body: Any) -> set[str]:
    """Names of the parameters that no map depends on, such as the norm before a pooler."""
    images = torch.zeros(1, body.config.num_channels, _PROBE, _PROBE, device="meta")
    torch.stack([x.sum() for x in body.train()(images).feature_maps]).sum().backward()
    return {name for name, p in body.named_parameters() if p.requires_grad and p.grad is None}


def _strides(body: Any, count: int) -> list[int]:
    """The strides of the maps."""
    images = torch.zeros(1, body.config.num_channels, _PROBE, _PROBE, device="meta")
    with torch.no_grad():
        maps = body.eval()(images).feature_maps
    if len(maps) != count:
        raise ValueError(f"it gives {len(maps)} maps of {count} stages")
    return [round(_PROBE / x.shape[-1]) for x in maps]


@contextlib.contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """ConfigError with one line for any error of transformers."""
    try:
        yield
    except Exception as error:  # transformers raises errors of many types
        text = " ".join(str(error).split())
        raise ConfigError(f"model.backbone={PREFIX}{name}: {text[:300]}") from None
