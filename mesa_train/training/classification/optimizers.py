"""Parameter groups, optimizers and the schedule of LITv2's recipe.

There are three groups: weights; tensors of one dimension, without weight decay; the weights of the
offset convolutions, at a hundredth of the rate. The biases of the offset convolutions are
one-dimensional and keep the full rate, as in the official code.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mesa_train.measure.optimizer_states import LEAST_8BIT, adamw_bytes
from mesa_train.training.config_schema import ConfigError

from .config import OptimConfig

Groups = list[dict[str, Any]]


def scaled(config: OptimConfig, value: float, global_batch: int) -> float:
    """Scale a rate to the global batch by the linear rule."""
    return value * global_batch / config.lr_batch if config.lr_batch else value


def groups(model: nn.Module, config: OptimConfig, global_batch: int) -> Groups:
    """The parameter groups "weights", "no_decay" and "offsets". Empty groups are left out."""
    lr = scaled(config, config.lr, global_batch)
    offsets: dict[str, Any] = {"name": "offsets", "weight_decay": config.weight_decay}
    if config.offset_floor == "scaled":
        offsets |= {"lr": lr, "lr_scale": config.offset_scale}
    else:
        offsets |= {"lr": lr * config.offset_scale}
    found: Groups = [
        {"name": "weights", "lr": lr, "weight_decay": config.weight_decay},
        {"name": "no_decay", "lr": lr, "weight_decay": 0.0},
        offsets,
    ]
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    members: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
            offset = name.endswith("conv_offset.weight")
            members[1 if plain else 2 if offset else 0].append(parameter)
    return [{**g, "params": own} for g, own in zip(found, members, strict=True) if own]


def check(name: str, device_type: str) -> None:
    """Check, before anything is built, that the optimizer runs on the device.

    Raises:
        ConfigError: bitsandbytes is missing or does not support the device.
    """
    if name in ("adamw", "sgd"):
        return
    _bitsandbytes(name)
    if device_type == "cpu":
        probe = nn.Parameter(torch.zeros(LEAST_8BIT))
        probe.grad = torch.ones_like(probe)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                build(OptimConfig(name=name), [{"params": [probe], "lr": 1.0}]).step()
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"optim.name={name}: this bitsandbytes cannot step on a CPU ({reason}); a newer "
                "one may, adamw can"
            ) from None


def build(
    config: OptimConfig, parameter_groups: Groups, capturable: bool = False
) -> torch.optim.Optimizer:
    """Build the optimizer of a configuration.

    Args:
        config: of the optimizer.
        parameter_groups: as `groups` returns them.
        capturable: whether "adamw" can step inside of a CUDA graph; default False.
    Raises:
        ConfigError: the optimizer needs bitsandbytes, and bitsandbytes is missing.
    """
    lr = parameter_groups[0]["lr"]
    if config.name == "sgd":
        return torch.optim.SGD(parameter_groups, lr=lr, momentum=config.momentum)
    common = {"lr": lr, "betas": config.betas}
    if config.name == "adamw":
        adamw = torch.optim.AdamW(parameter_groups, eps=config.eps, capturable=capturable, **common)

        def as_built(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            # A checkpoint of a run with the other choice would change this optimizer's.
            groups = [group | {"capturable": capturable} for group in state["param_groups"]]
            return state | {"param_groups": groups}

        adamw.register_load_state_dict_pre_hook(as_built)
        return adamw
    bnb = _bitsandbytes(config.name).optim
    if config.name == "lion8bit":
        return bnb.Lion8bit(parameter_groups, **common)
    kind = bnb.AdamW8bit if config.name == "adamw8bit" else bnb.PagedAdamW8bit
    return kind(parameter_groups, eps=config.eps, **common)


def state_bytes(name: str, parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of optimizer states on the device. Paged states count, because they may be resident."""
    if name == "sgd":
        return sum(p.nbytes for p in parameters)
    if name == "adamw":
        return sum(adamw_bytes(p.numel(), p.element_size()) for p in parameters)
    two = sum(adamw_bytes(p.numel(), p.element_size(), eight_bit=True) for p in parameters)
    # Lion has one moment; Adam has two.
    return two // 2 if name == "lion8bit" else two


def _bitsandbytes(name: str) -> Any:
    """Import bitsandbytes. ConfigError if it is missing."""
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError(
            f"optim.name={name} needs: pip install 'mesa_train[bitsandbytes]'"
        ) from None
    return bitsandbytes


class Schedule:
    """timm's cosine schedule over optimizer steps. The warm-up is part of the cosine's time.

    With `optim.rate_per="epoch"` all steps of an epoch have the rate of its first step. The
    schedule has no state.
    """

    def __init__(
        self, optimizer: Any, config: OptimConfig, global_batch: int, epochs: int, steps: int
    ) -> None:
        from timm.scheduler import CosineLRScheduler

        self._steps = steps if config.rate_per == "epoch" else 1
        self._cosine = CosineLRScheduler(
            optimizer,
            t_initial=epochs * steps,
            lr_min=scaled(config, config.min_lr, global_batch),
            warmup_t=round(config.warmup_epochs * steps),
            warmup_lr_init=scaled(config, config.warmup_lr, global_batch),
            t_in_epochs=False,
        )

    def at(self, step: int) -> None:
        """Set the rates of the optimizer step that follows `step` steps."""
        self._cosine.step_update(step - step % self._steps)
