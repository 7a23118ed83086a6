"""Load a model and inputs that fit it from the MODEL string of the command line.

    vit_small_patch16_224             timm, random weights; also litv2_s, vit_22b_tiny and similar
    hf:vit                            transformers: a model type or class with its default config, a
                                      folder or config.json, or a name on the hub; random weights
                                      if there is only a config
    torchvision:vit_b_16              torchvision, random weights
    python:my_package.module.factory  any importable callable, or python:PATH.py:FACTORY (see
                                      `factory.py`)

On the meta device nothing is allocated, so a model of any size loads at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mesa_train.measure.fake_tensors import FakeModel
from mesa_train.measure.isolation import isolated
from mesa_train.measure.step import arguments, device_of, tensors_in
from mesa_train.utils.errors import one_line

from .factory import Fixed, check_inputs, from_factory, make_inputs, unknown
from .inputs import batch_of, on_meta


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in training mode and inputs for it.

    Args:
        name: the MODEL string.
        model: the module.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
        batch: number of images of the inputs; None if it is not known.
        make: makes inputs of another batch size; None if the factory gave no such function.
    """

    name: str
    model: nn.Module
    inputs: Any
    batch: int | None = None
    make: Callable[[int], Any] | None = None

    def shapes(self) -> list[list[int]]:
        """The shape of every tensor among the inputs."""
        return [list(t.shape) for t in tensors_in(self.inputs)]


def load(
    name: str, *, batch_size: int = 8, image_size: int | None = None, device: str = "cpu"
) -> Loaded:
    """Build the model that `name` describes, with random images.

    Args:
        name: the MODEL string.
        batch_size: number of images.
        image_size: height and width of the images; default: the model's own size.
        device: device of model and inputs; "meta" allocates nothing.

    Raises:
        ValueError: the scheme or name is unknown (the message has close names), or the model does
            not accept the image size.
        ImportError: a package is missing; the message says what to install.
        TypeError: a factory returns no module.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    scheme, colon, rest = name.partition(":")
    builders: dict[str, Callable[[str, int | None], tuple[nn.Module, Any]]] = {
        "timm": _timm,
        "hf": _transformers,
        "torchvision": _torchvision,
        "python": functools.partial(from_factory, batch_size=batch_size),
    }
    if not colon:
        scheme, rest = "timm", name
    if scheme not in builders:
        near = difflib.get_close_matches(scheme, builders, n=1)
        hint = f" (did you mean {near[0]}:{rest}?)" if near else ""
        raise ValueError(
            f"unknown scheme {scheme!r} in model {name!r}; choose from a timm name, "
            f"hf:CONFIG_OR_PATH, torchvision:NAME, python:MODULE.FACTORY{hint}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device(device):
            model, inputs = builders[scheme](rest, image_size)
            make = inputs if callable(inputs) else None
            if make is not None:
                inputs = make_inputs(name, make, batch_size)
    batch = batch_size
    if isinstance(inputs, Fixed):
        inputs = inputs.inputs
        batch = batch_of(inputs, batch_size)
    if device == "meta":
        # A factory may ignore the device and make its tensors elsewhere.
        model.to("meta")
        inputs = on_meta(inputs)
    model.train()
    check_inputs(name, model, inputs)
    if image_size is not None:
        _check_size(name, model, inputs, image_size)
    return Loaded(name, model, inputs, batch, make)


def _timm(name: str, image_size: int | None) -> tuple[nn.Module, Any]:
    """A timm model with random weights, and random images of its size."""
    timm = _package("timm", "mesa_train[timm]")
    # The models of mesa_train are timm models after this import.
    with contextlib.suppress(ImportError):
        importlib.import_module("mesa_train.models")
    if not timm.is_model(name):
        raise ValueError(unknown("timm model", name, timm.list_models()))
    model = _built(
        f"timm's {name}",
        lambda **size: timm.create_model(name, **size),
        image_size,
        lambda n: {"img_size": n},
    )
    channels, height, width = timm.data.resolve_model_data_config(model)["input_size"]
    return model, _images(channels, image_size or height, image_size or width)


def _torchvision(name: str, image_size: int | None) -> tuple[nn.Module, Any]:
    """A torchvision model with random weights, and random images of its size."""
    torchvision = _package("torchvision", "mesa_train[timm]")
    if name not in torchvision.models.list_models():
        raise ValueError(unknown("torchvision model", name, torchvision.models.list_models()))
    model = _built(
        f"torchvision's {name}",
        lambda **size: torchvision.models.get_model(name, weights=None, **size),
        image_size,
        lambda n: {"image_size": n},
        lambda n: {"input_size": (n, n)},
    )
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms
    crop_size = getattr(transforms, "keywords", {}).get("crop_size", 224)
    size = image_size or (crop_size if isinstance(crop_size, int) else crop_size[0])
    return model, _images(3, size, size)


def _transformers(name: str, image_size: int | None) -> tuple[nn.Module, Any]:
    """A transformers model and random images; its weights are read if there are any."""
    transformers = _package("transformers", "transformers")
    config, folder, model_class = _transformers_config(transformers, name)
    if not hasattr(config, "image_size"):
        raise ValueError(
            f"the config of hf:{name} has no image_size, so mesa_train cannot make images; write a "
            "factory that returns (model, inputs) and use python:MODULE.FACTORY"
        )
    if image_size is not None:
        config.image_size = image_size
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    model_class = model_class or _classifier(transformers, config)
    if "pixel_values" not in inspect.signature(model_class.forward).parameters:
        raise ValueError(
            f"hf:{name} is a {model_class.__name__}, whose forward has no argument pixel_values"
        )
    without_data = torch.empty(0).device.type == "meta"
    if folder is not None and not without_data and image_size is None:
        model = model_class.from_pretrained(folder)
    else:
        model = model_class(config)
    images = _images(getattr(config, "num_channels", 3), height, width)
    return model, lambda batch_size: {"pixel_values": images(batch_size)}


def _transformers_config(transformers: Any, name: str) -> tuple[Any, str | None, Any]:
    """(config, folder or name of the weights or None, the model class if the name is one)."""
    path = Path(name)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        if not (folder / "config.json").exists() and path.is_dir():
            raise ValueError(f"hf:{name} is a folder without a config.json")
        try:
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(
                f"hf:{name} is not a transformers config: {one_line(error)}"
            ) from error
        has_weights = path.is_dir() and (
            any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
        )
        return config, name if has_weights else None, None
    model_types = list(transformers.CONFIG_MAPPING.keys())
    if name in model_types:
        return transformers.AutoConfig.for_model(name), None, None
    entry = getattr(transformers, name, None) if name.isidentifier() else None
    config_class = getattr(entry, "config_class", None)
    if config_class is not None:
        return config_class(), None, entry
    if inspect.isclass(entry) and issubclass(entry, transformers.PretrainedConfig):
        return entry(), None, None
    if "/" in name and not name.endswith("/"):
        try:
            return transformers.AutoConfig.from_pretrained(name), name, None
        except (ValueError, OSError) as error:
            raise ValueError(
                f"hf:{name} is not a local file or folder, and loading it from the hub failed: "
                f"{one_line(error)}"
            ) from error
    raise ValueError(unknown("transformers config, model type or path", name, model_types))


def _classifier(transformers: Any, config: Any) -> Any:
    """The image classifier for a config, else its base model."""
    mapping = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        mapping = transformers.MODEL_MAPPING
    if type(config) not in mapping:
        raise ValueError(f"transformers has no image model for a {type(config).__name__}")
    classes = mapping[type(config)]
    if not isinstance(classes, tuple | list):
        return classes
    matches = [
        candidate
        for candidate in classes
        if candidate.__name__ in (getattr(config, "architectures", None) or [])
    ]
    return (matches or classes)[0]


def _built(
    description: str,
    build: Callable[..., nn.Module],
    image_size: int | None,
    *keywords: Callable[[int], dict[str, Any]],
) -> nn.Module:
    """Call `build`, with the image size under the first of `keywords` that it takes."""
    try:
        if image_size is not None:
            for keyword in keywords:
                # A constructor without this keyword raises a TypeError.
                with contextlib.suppress(TypeError):
                    return build(**keyword(image_size))
        return build()
    except (ValueError, AssertionError, RuntimeError) as error:
        size = "" if image_size is None else f" with images of {image_size}x{image_size}"
        raise ValueError(f"{description} cannot be built{size}: {one_line(error)}") from error


def _check_size(name: str, model: nn.Module, inputs: Any, image_size: int) -> None:
    """Run a forward on fake tensors; ValueError if the model does not accept the image size."""
    device = device_of(model)
    fake_model = FakeModel(torch.device("cpu") if device.type == "meta" else device)
    args, kwargs = arguments(inputs)
    try:
        with isolated(model, fake_model), torch.no_grad():
            model(*fake_model.of(args), **fake_model.of(kwargs))
    except Exception as error:  # Any error of the model's own check.
        raise ValueError(
            f"{name} does not accept images of {image_size}x{image_size}: {one_line(error)}"
        ) from error


def _images(channels: int, height: int, width: int) -> Callable[[int], torch.Tensor]:
    """A function of the batch size that makes random images."""
    return lambda batch_size: torch.randn(batch_size, channels, height, width)


def _package(name: str, install: str) -> Any:
    """Import a package; ImportError says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed; pip install '{install}'") from error
