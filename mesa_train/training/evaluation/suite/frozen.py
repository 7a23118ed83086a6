"""A frozen model with one interface: features, classifier, preprocessing; from timm or transformers.

The features are the input of the classifier. For a transformers model without a classifier they are
the pooled output, or the class token where the pooler is not pre-trained (ViT, DeiT), or the mean of
the tokens.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mesa_train.training.config_schema import ConfigError

# Poolers of these transformers models are random unless they were fine-tuned.
_UNTRAINED_POOLERS = ("vit", "deit", "vit_msn", "vit_mae")


@dataclass
class FrozenModel:
    """A model in eval mode, without gradients.

    Attributes:
        name: as given.
        model: the module.
        classifier: Linear from features to logits; None if the model has none.
        size: side of the input images in pixels.
        mean: of normalised pixels, by channel.
        std: of normalised pixels, by channel.
        interpolation: of the resize, "bicubic" or "bilinear".
        channels: of the input images, 3 or 1.
        key: identifies model and weights, for the cache of features.
        hub: true for a model of transformers.
    """

    name: str
    model: Any
    classifier: Any
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    channels: int
    key: str
    hub: bool = False

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (N, width) in float32 of images (N, channels, size, size), without a graph."""
        return self.trained_features(images)

    def trained_features(self, images: Tensor) -> Tensor:
        """`features` with a graph, for a model that is trained further."""
        if not self.hub:
            tokens = self.model.forward_features(images)
            return self.model.forward_head(tokens, pre_logits=True).float()
        if self.classifier is not None:
            return _input_of(self.classifier, lambda: self.model(images)).float()
        out = self.model(images)
        kind = getattr(self.model.config, "model_type", "")
        pooled = getattr(out, "pooler_output", None)
        if pooled is not None and kind not in _UNTRAINED_POOLERS:
            return pooled.flatten(1).float()
        tokens = out.last_hidden_state
        token = tokens[:, 0] if kind in _UNTRAINED_POOLERS else tokens.flatten(2).mean(1)
        return token.float()

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, classes) of features. ValueError if the model has no classifier."""
        if self.classifier is None:
            raise ValueError(f"{self.name} has no classifier")
        device = next(self.model.parameters()).device
        parts = [self.classifier(x.to(device)).float().cpu() for x in features.split(1024)]
        return torch.cat(parts)

    def pixels(self, image: Any, squash: bool = False, short_side: int | None = None) -> Tensor:
        """Normalised pixels (channels, size, size) of a PIL image.

        Args:
            image: RGB.
            squash: resize the whole image to the square: for images that fill their frame.
            short_side: resize the short side to this and crop; default: resize to a square of
                size / 0.875 and crop.
        """
        from PIL import Image
        from torchvision.transforms import v2
        from torchvision.transforms.v2 import functional as F

        how = v2.InterpolationMode(self.interpolation)
        if squash:
            image = F.resize(image, [self.size, self.size], how, antialias=True)
        elif short_side is not None:
            image = F.center_crop(F.resize(image, [short_side], how, antialias=True), [self.size])
        else:
            side = round(self.size / 0.875)
            image = F.center_crop(F.resize(image, [side, side], how, antialias=True), [self.size])
        assert isinstance(image, Image.Image)
        if self.channels == 1:
            image = image.convert("L")
        tensor = F.to_dtype(F.to_image(image), torch.float32, scale=True)
        return F.normalize(tensor, list(self.mean), list(self.std))


def load_model(
    name: str, weights: str | None, *, size: int | None, classes: int | None, device: str
) -> FrozenModel:
    """Load a model by name.

    Args:
        name: a timm model, this project's included; a folder with a transformers `config.json`; or
            "org/name" of a transformers model.
        weights: a file of weights, "pretrained" for timm's, or None for random weights of seed 0.
            A transformers folder has its own weights.
        size: of the images in pixels; default: the model's own.
        classes: of a classifier that `weights` has; default: the model's own number.
        device: "cpu", "cuda" or "cuda:0".
    Raises:
        ValueError: the name is unknown, the weights do not fit, or the size does not fit.
    """
    if (Path(name) / "config.json").is_file() or "/" in name:
        return _of_hub(name, weights, size, device)
    return _of_timm(name, weights, size, classes, device)


def configured_model(name: str, weights: str | None, size: int | None, device: str) -> FrozenModel:
    """The model of a recipe's section `model`.

    Args:
        name: as in `load_model`.
        weights: a file, "pretrained" or None. The classes of a file's classifier are read from it.
        size: of the images in pixels; default: the model's own.
        device: of the model.
    Raises:
        ConfigError: names the setting that is wrong.
    """
    hub = "/" in name or (Path(name) / "config.json").is_file()
    classes = None if hub or weights in (None, "pretrained") else head_of(str(weights))
    try:
        return load_model(name, weights, size=size, classes=classes, device=device)
    except (ValueError, OSError) as error:
        line = _line(error).replace("--model", "model.name").replace("--weights", "model.weights")
        raise ConfigError(line) from None


def head_of(path: str) -> int | None:
    """The classes of the classifier in a safetensors file; 0 if there is none, None if unknown."""
    from safetensors import safe_open

    if not path.endswith(".safetensors") or not Path(path).is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about, keys = file.metadata() or {}, list(file.keys())
            if "classes" in about:
                return int(about["classes"])
            heads = [k for k in keys if k in ("head.weight", "fc.weight", "head.fc.weight")]
            return int(file.get_slice(heads[0]).get_shape()[0]) if heads else 0
    except Exception:  # a damaged file gets its message from the loader
        return None


def _of_timm(
    name: str, weights: str | None, size: int | None, classes: int | None, device: str
) -> FrozenModel:
    import timm
    from timm.data import resolve_model_data_config

    import mesa_train.models as registered  # noqa: F401  timm knows them from here on

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4)
        hint = f"; close names: {', '.join(near)}" if near else ""
        raise ValueError(
            f"--model: no model {name!r} in timm and no folder with a config.json{hint}"
        )
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    torch.manual_seed(0)
    try:
        model = _created(name, weights == "pretrained", size, options)
    except (RuntimeError, AssertionError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"--model {name}: {_line(error)}") from None
    if weights not in (None, "pretrained"):
        _load(model, Path(str(weights)))
    model = model.requires_grad_(False).eval().to(device)
    config = resolve_model_data_config(model)
    classifier = model.get_classifier() if weights is not None else None
    if not isinstance(classifier, nn.Linear):
        classifier = None
    side = size or int(config["input_size"][-1])
    made = FrozenModel(
        name, model, classifier, side, tuple(config["mean"]), tuple(config["std"]),
        config["interpolation"], int(config["input_size"][0]), key_of(name, weights, side),
    )  # fmt: skip
    return _tried(made, device)


def _created(name: str, pretrained: bool, size: int | None, options: dict[str, Any]) -> Any:
    """timm's model, with the image size if its constructor takes one."""
    import timm

    if size is None:
        return timm.create_model(name, pretrained=pretrained, **options)
    try:
        return timm.create_model(name, pretrained=pretrained, img_size=size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, pretrained=pretrained, **options)


def _of_hub(name: str, weights: str | None, size: int | None, device: str) -> FrozenModel:
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    if weights not in (None, "pretrained"):
        raise ValueError(f"--weights: a transformers model has its own weights, got {weights}")
    try:
        config = AutoConfig.from_pretrained(name)
        kinds = getattr(config, "architectures", None) or []
        is_classifier = any(kind.endswith("ForImageClassification") for kind in kinds)
        factory = AutoModelForImageClassification if is_classifier else AutoModel
        model: Any = factory.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: {_line(error)}") from None
    model = getattr(model, "vision_model", model).requires_grad_(False).eval().to(device)
    classifier = getattr(model, "classifier", None) if is_classifier else None
    path = Path(name) / "preprocessor_config.json"
    about = json.loads(path.read_text()) if path.is_file() else {}
    side = size or getattr(model.config, "image_size", None) or 224
    side = int(side[0] if isinstance(side, list | tuple) else side)
    made = FrozenModel(
        name, model, classifier if isinstance(classifier, nn.Linear) else None, side,
        tuple(about.get("image_mean", (0.5,) * 3)), tuple(about.get("image_std", (0.5,) * 3)),
        "bicubic", int(getattr(model.config, "num_channels", 3)), key_of(name, name, side), hub=True,
    )  # fmt: skip
    return _tried(made, device)


def _tried(made: FrozenModel, device: str) -> FrozenModel:
    """The model, after one image. ValueError if it does not take the size."""
    try:
        made.features(torch.zeros(1, made.channels, made.size, made.size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"--model {made.name} cannot take images of {made.size}x{made.size}: {_line(error)}"
        ) from None
    return made


def _load(model: nn.Module, path: Path) -> None:
    """Load a file of weights: safetensors of this project, or an official checkpoint."""
    from mesa_train.models.lit.official import read_official
    from mesa_train.models.moco.encoder import MoCoViT
    from mesa_train.models.moco.official import load_official
    from mesa_train.training.checkpoints import load_weights

    if not path.is_file():
        raise ValueError(f"--weights: no file {path}")
    if path.suffix == ".safetensors":
        load_weights(model, path)
    elif isinstance(model, MoCoViT):
        load_official(model, path, heads=int(model.blocks[0].attn.num_heads))
    else:
        found = read_official(path)
        try:
            model.load_state_dict(found)
        except RuntimeError as error:
            raise ValueError(f"--weights: {path} is of another model: {_line(error)}") from None


def key_of(name: str, weights: str | None, size: int) -> str:
    """A text that changes with model, weights and size. A rewritten file has another time."""
    path = Path(weights) if weights else None
    files = [] if path is None else [path] if path.is_file() else sorted(path.glob("*"))
    stamp = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return f"{name} {weights} {stamp} {size}"


def _input_of(module: nn.Module, call: Any) -> Tensor:
    """The first input of a module during a call."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        call()
    finally:
        handle.remove()
    return seen[0]


def _line(error: Exception) -> str:
    """An error's message in one line."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


def to_rgb(pixels: Any) -> Any:
    """A PIL image of uint8 pixels (H, W) or (H, W, 3)."""
    from PIL import Image

    return Image.fromarray(np.asarray(pixels)).convert("RGB")
