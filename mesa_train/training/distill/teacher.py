"""A frozen teacher that sees the pixels of the student: same crop, flip and mixup.

The pixels are normalised again for the teacher, and resized if the teacher has another size. Its
Linear weights may be coded in 8 or 4 bits (bitsandbytes), so that a large teacher fits on the card
of the student. The classifier and matrices below 4,096 elements keep their dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mesa_train.training.config_schema import ConfigError

from .config import DistillConfig

# timm's normalisation, which the student's transform applies.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LUMINANCE = (0.299, 0.587, 0.114)
LEAST = 4096


class Teacher:
    """Logits of a frozen model for the student's pixels.

    Args:
        config: the section `distill`.
        classes: of the student.
        image_size: of the student in pixels.
        device: of the model.
    Raises:
        ConfigError: the model or its weights are wrong, or its classes are others.
    """

    def __init__(
        self, config: DistillConfig, classes: int, image_size: int, device: torch.device
    ) -> None:
        from mesa_train.training.evaluation.suite.frozen import load_model

        assert config.teacher is not None
        check_files(config)
        self.size = config.image_size or image_size
        hub = is_folder(config.teacher)
        # Weights are coded on the way to the device, so a coded teacher is loaded on the host.
        place = "cpu" if config.bits != "16" else str(device)
        try:
            self.net = load_model(
                config.teacher,
                config.weights,
                size=self.size,
                classes=None if hub else classes,
                device=place,
            )
        except (ValueError, OSError) as error:
            line = " ".join(str(error).split())
            line = line.replace("--model", "distill.teacher:").replace(
                "--weights", "distill.weights"
            )
            raise ConfigError(line.replace("::", ":")) from None
        self.model: nn.Module = self.net.model
        if config.bits != "16":
            coded(self.model, int(config.bits), self.net.classifier)
            self.model.to(device)
        self.device = device
        self._check(config, classes, image_size)

    def _check(self, config: DistillConfig, classes: int, image_size: int) -> None:
        """ConfigError if the teacher cannot run, or has other classes than the student."""
        try:
            found = self(torch.zeros(2, 3, image_size, image_size))
        except (AttributeError, RuntimeError, TypeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"distill.teacher={config.teacher} with distill.bits={config.bits} cannot run: "
                f"{reason}"
            ) from None
        if tuple(found.shape) != (2, classes):
            raise ConfigError(
                f"distill.teacher={config.teacher} gives outputs of shape {tuple(found.shape[1:])}; "
                f"the data has {classes} classes"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, classes) in float32 of the student's normalised pixels (N, 3, H, W)."""
        images = images.to(self.device)
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        pixels = images * std + mean
        if self.net.channels == 1:
            pixels = (pixels * images.new_tensor(_LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
        if pixels.shape[-1] != self.size:
            pixels = F.interpolate(
                pixels, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            )
        mean, std = (images.new_tensor(v).view(1, -1, 1, 1) for v in (self.net.mean, self.net.std))
        output: Any = self.model((pixels - mean) / std)
        logits: Tensor = getattr(output, "logits", output)
        return logits.float()

    @property
    def bytes(self) -> int:
        """Bytes of parameters and buffers on the device."""
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))


def key_of(config: DistillConfig, image_size: int) -> str:
    """A text that changes with the teacher's model, file, size and bits. Loads nothing.

    Args:
        config: the section `distill`.
        image_size: of the student in pixels.
    """
    from mesa_train.training.evaluation.suite import frozen

    name = str(config.teacher)
    weights = name if is_folder(name) else config.weights
    size = config.image_size or image_size
    return f"{frozen.key_of(name, weights, size)} {config.bits} bits"


def coded(model: nn.Module, bits: int, classifier: Any = None) -> nn.Module:
    """Replace the Linear modules of a frozen model by bitsandbytes' modules, in place.

    Args:
        model: on the CPU. `model.to(device)` codes the weights.
        bits: 8 (LLM.int8) or 4 (NF4 in blocks of 64).
        classifier: a module that keeps its weights; default: none.
    Returns:
        `model`.
    Raises:
        ConfigError: bitsandbytes is missing.
    """
    try:
        import bitsandbytes.nn as bnb
    except ImportError:
        raise ConfigError(
            f"distill.bits={bits} needs: pip install 'mesa_train[bitsandbytes]'"
        ) from None
    for name, module in list(model.named_modules()):
        small = getattr(getattr(module, "weight", None), "numel", lambda: 0)() < LEAST
        if type(module) is not nn.Linear or module is classifier or small:
            continue
        shape, bias = (module.in_features, module.out_features), module.bias is not None
        dtype = module.weight.dtype
        new: nn.Module
        if bits == 8:
            new = bnb.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
        else:
            new = bnb.Linear4bit(*shape, bias=bias, quant_type="nf4", compute_dtype=dtype)
        new.load_state_dict(module.state_dict())
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new.requires_grad_(False).eval())
    return model


def is_folder(name: str) -> bool:
    """True for a transformers folder or the name of a transformers model on a hub."""
    return (Path(name) / "config.json").is_file() or "/" in name


def check_files(config: DistillConfig) -> None:
    """Raise ConfigError if there is no teacher, or if its file is missing."""
    if not config.teacher:
        raise ConfigError("distill.teacher is missing: a timm model or a transformers folder")
    if is_folder(config.teacher):
        return
    if not config.weights:
        raise ConfigError(
            "distill.weights is missing: a file with the weights of the teacher, or pretrained"
        )
    if config.weights != "pretrained" and not Path(config.weights).is_file():
        raise ConfigError(f"distill.weights: no such file {config.weights}")


def parameters(config: DistillConfig, classes: int) -> tuple[int, int]:
    """(parameters, bytes) of the teacher, counted on the meta device.

    Raises:
        ConfigError: the model is unknown.
    """
    import difflib

    import timm

    import mesa_train.models as registered  # noqa: F401  timm knows them from here on

    assert config.teacher is not None
    if is_folder(config.teacher):
        from transformers import AutoConfig, AutoModelForImageClassification

        try:
            about = AutoConfig.from_pretrained(config.teacher)
            with torch.device("meta"):
                model: Any = AutoModelForImageClassification.from_config(about)
        except (OSError, ValueError) as error:
            raise ConfigError(f"distill.teacher: {' '.join(str(error).split())[:200]}") from None
    elif not timm.is_model(config.teacher):
        near = ", ".join(difflib.get_close_matches(config.teacher, timm.list_models(), n=3))
        raise ConfigError(
            f"distill.teacher: no model {config.teacher!r} in timm and no folder with a "
            f"config.json{'; close names: ' + near if near else ''}"
        )
    else:
        with torch.device("meta"):
            model = timm.create_model(config.teacher, num_classes=classes)
    share = {"16": 4.0, "8": 1.0, "4": 0.5}[config.bits]
    count = size = 0
    for module in model.modules():
        for value in module.parameters(recurse=False):
            large = type(module) is nn.Linear and value.dim() == 2 and value.numel() >= LEAST
            count += value.numel()
            size += round(value.numel() * (share if large else 4))
    return count, size
