"""Load a user's own model: `python:MODULE.FACTORY` and `python:PATH.py:FACTORY`.

The factory returns a module or (module, inputs). The inputs are a tensor, a tuple of arguments or a
dict of keyword arguments; or a function of the batch size that makes one of these. The factory is
called with batch_size and image_size if it takes them. Every error of the factory becomes one line
that says where it was raised.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mesa_train.measure.step import arguments, tensors_in
from mesa_train.utils.errors import one_line


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Inputs of a factory that takes no batch_size."""

    inputs: Any


def from_factory(name: str, image_size: int | None, batch_size: int) -> tuple[nn.Module, Any]:
    """Call the factory that `name` describes.

    On the meta device, a factory that needs values is called again on the CPU.

    Args:
        name: MODULE.FACTORY or PATH.py:FACTORY, without the scheme.
        image_size: height and width of images, if the factory takes image_size; None for its
            default.
        batch_size: number of images, if the factory takes batch_size.

    Returns:
        (model, inputs or a function of the batch size). Inputs that the factory makes for one batch
            size alone are `Fixed`.

    Raises:
        ValueError: the module or factory does not exist, or it fails.
        TypeError: the factory returns something else.
    """
    module, attribute = _module(name)
    factory = getattr(module, attribute, None)
    if factory is not None and not callable(factory):
        raise ValueError(f"python:{name} must be a function, got {type(factory).__name__}")
    if factory is None:
        names = [
            name
            for name, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise ValueError(unknown(f"callable in {module.__name__}", attribute, names))
    offered = {"batch_size": batch_size, "image_size": image_size}
    accepted = _keywords(factory)
    call_kwargs = {k: v for k, v in offered.items() if k in accepted and v is not None}
    try:
        result = factory(**call_kwargs)
    except (Exception, SystemExit) as error:
        result = _on_the_cpu(name, factory, call_kwargs, error)
    model, inputs = _checked(name, result, image_size)
    fixed = "batch_size" not in accepted and not callable(inputs)
    return model, Fixed(inputs) if fixed else inputs


def _on_the_cpu(
    name: str, factory: Callable[..., Any], call_kwargs: dict[str, Any], error: BaseException
) -> Any:
    """Call a factory again on the CPU if it failed on the meta device."""
    try:
        if torch.empty(0).device.type != "meta":
            raise error
        with torch.device("cpu"):
            return factory(**call_kwargs)
    except (Exception, SystemExit) as reason:
        message = one_line(reason)
        message = (
            message
            if message.startswith(type(reason).__name__)
            else f"{type(reason).__name__}: {message}"
        )
        raise ValueError(f"python:{name} failed: {message}") from reason


def _checked(name: str, result: Any, image_size: int | None) -> tuple[nn.Module, Any]:
    """(model, inputs) of a factory's result; without inputs, a function that makes images."""
    is_pair = isinstance(result, tuple) and len(result) == 2
    model, inputs = result if is_pair else (result, None)
    if not isinstance(model, nn.Module):
        kind = type(result).__name__
        if isinstance(result, tuple):
            kind = f"a tuple of {', '.join(type(part).__name__ for part in result) or 'nothing'}"
        raise TypeError(f"python:{name} must return a module or (module, inputs), got {kind}")
    if inputs is None:
        size = image_size or 224
        return model, lambda batch: torch.randn(batch, 3, size, size)
    return model, inputs


def make_inputs(name: str, make: Callable[[int], Any], batch_size: int) -> Any:
    """Call a function of the batch size that makes inputs; on the CPU again if it fails on meta.

    Raises:
        ValueError: the function fails; the message says where.
    """
    try:
        return make(batch_size)
    except Exception as error:
        if torch.empty(0).device.type == "meta":
            with torch.device("cpu"):
                return make_inputs(name, make, batch_size)
        raise ValueError(
            f"{name}: the function of inputs failed for batch size {batch_size}: {one_line(error)}"
        ) from error


def check_inputs(name: str, model: nn.Module, inputs: Any) -> None:
    """Check that the inputs fit the model.

    Raises:
        TypeError: the inputs have no tensor.
        ValueError: the model's forward does not take these inputs.
    """
    if not any(True for _ in _tensors(inputs)):
        raise TypeError(
            f"{name}: inputs must be a tensor, a tuple of arguments, a dict of keyword arguments or a "
            "function of the batch size that makes one of these, got "
            f"{type(inputs).__name__} without a tensor"
        )
    args, kwargs = arguments(inputs)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return  # Written in C, without a signature.
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        call = f"{type(model).__name__}.forward({', '.join(signature.parameters)})"
        is_list = isinstance(inputs, tuple | list) and len(inputs) > 1
        hint = "; for one argument that is a list, return ([...],) or a dict" if is_list else ""
        raise ValueError(f"{name}: its inputs do not fit {call}: {error}{hint}") from error


def _tensors(inputs: Any) -> Iterator[Tensor]:
    """Every tensor among the inputs."""
    yield from tensors_in(inputs)


def _module(name: str) -> tuple[Any, str]:
    """(the imported module that a name describes, the name of the factory in it)."""
    path, colon, attribute = name.rpartition(":")
    if colon and path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"python:{name}: no file {path}")
        folder, module_name = Path(path).resolve().parent, Path(path).stem
    else:
        module_name, _, attribute = name.replace(":", ".").rpartition(".")
        folder = Path.cwd()
        if attribute == "py" or "/" in name:
            raise ValueError(f"python:{name}: write a file as python:PATH.py:FACTORY")
    if not module_name or not attribute:
        raise ValueError(
            f"python:{name} must name a module and a function in it, such as "
            f"python:{name or 'my_model'}.build"
        )
    if str(folder) not in sys.path and ("" not in sys.path or folder != Path.cwd()):
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module_name), attribute
    except ModuleNotFoundError as error:
        # The missing module may be one that the user's own module imports.
        raise ValueError(f"python:{name}: there is no module named {error.name!r}") from error
    except SyntaxError as error:
        where = f"{Path(error.filename or '').name}, line {error.lineno}"
        raise ValueError(f"python:{name}: {error.msg} ({where})") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"python:{name} cannot be imported: {one_line(error)}") from error


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name, with the closest known names."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.6)
    if close:
        return f"no {what} {name!r}; close names: {', '.join(close)}"
    choices = f"; there is {', '.join(names)}" if 0 < len(names) <= 8 else ""
    return f"no {what} {name!r}{choices}"


def _keywords(factory: Callable[..., Any]) -> set[str]:
    """Names of the parameters that accept keyword arguments."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return set()  # Written in C, without a signature.
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {parameter.name for parameter in parameters if parameter.kind in by_keyword}
