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
        raise ValueError(f"python:{name} is no function, got {type(factory).__name__}")
    if factory is None:
        names = [
            n
            for n, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise ValueError(unknown(f"callable in {module.__name__}", attribute, names))
    asked = {"batch_size": batch_size, "image_size": image_size}
    taken = _keywords(factory)
    given = {k: v for k, v in asked.items() if k in taken and v is not None}
    try:
        found = factory(**given)
    except (Exception, SystemExit) as error:
        found = _on_the_cpu(name, factory, given, error)
    model, inputs = _checked(name, found, image_size)
    fixed = "batch_size" not in taken and not callable(inputs)
    return model, Fixed(inputs) if fixed else inputs


def _on_the_cpu(
    name: str, factory: Callable[..., Any], given: dict[str, Any], error: BaseException
) -> Any:
    """Call a factory again on the CPU if it failed on the meta device."""
    try:
        if torch.empty(0).device.type != "meta":
            raise error
        with torch.device("cpu"):
            return factory(**given)
    except (Exception, SystemExit) as reason:
        said = one_line(reason)
        said = (
            said if said.startswith(type(reason).__name__) else f"{type(reason).__name__}: {said}"
        )
        raise ValueError(f"python:{name} failed: {said}") from reason


def _checked(name: str, found: Any, image_size: int | None) -> tuple[nn.Module, Any]:
    """(model, inputs) of a factory's result; without inputs, a function that makes images."""
    pair = isinstance(found, tuple) and len(found) == 2
    model, inputs = found if pair else (found, None)
    if not isinstance(model, nn.Module):
        kind = type(found).__name__
        if isinstance(found, tuple):
            kind = f"a tuple of {', '.join(type(part).__name__ for part in found) or 'nothing'}"
        raise TypeError(f"python:{name} must return a module or (module, inputs), got {kind}")
    if inputs is None:
        size = image_size or 224
        return model, lambda batch: torch.randn(batch, 3, size, size)
    return model, inputs


def made(name: str, make: Callable[[int], Any], batch_size: int) -> Any:
    """Call a function of the batch size that makes inputs; on the CPU again if it fails on meta.

    Raises:
        ValueError: the function fails; the message says where.
    """
    try:
        return make(batch_size)
    except Exception as error:
        if torch.empty(0).device.type == "meta":
            with torch.device("cpu"):
                return made(name, make, batch_size)
        raise ValueError(f"{name}: inputs of {batch_size} failed: {one_line(error)}") from error


def check_inputs(name: str, model: nn.Module, inputs: Any) -> None:
    """Check that the inputs fit the model.

    Raises:
        TypeError: the inputs have no tensor.
        ValueError: the model's forward does not take these inputs.
    """
    if not any(True for _ in _tensors(inputs)):
        raise TypeError(
            f"{name}: inputs must be a tensor, a tuple of arguments, a dict of keyword arguments or a "
            f"function of the batch size that makes one, got {type(inputs).__name__} without a tensor"
        )
    args, kwargs = arguments(inputs)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return  # Written in C, without a signature.
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        taken = f"{type(model).__name__}.forward({', '.join(signature.parameters)})"
        listed = isinstance(inputs, tuple | list) and len(inputs) > 1
        hint = "; for one argument that is a list, return ([...],) or a dict" if listed else ""
        raise ValueError(f"{name}: its inputs do not fit {taken}: {error}{hint}") from error


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
            raise ValueError(f"python:{name}: a file is named as python:PATH.py:FACTORY")
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
        # The user's own module may also import a missing module: name that one.
        raise ValueError(f"python:{name}: no module named {error.name!r} to import") from error
    except SyntaxError as error:
        where = f"{Path(error.filename or '').name}, line {error.lineno}"
        raise ValueError(f"python:{name}: {error.msg} ({where})") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"python:{name} cannot be imported: {one_line(error)}") from error


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name, with the closest known names."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.6)
    if near:
        return f"no {what} {name!r}; close names: {', '.join(near)}"
    few = f"; there is {', '.join(names)}" if 0 < len(names) <= 8 else ""
    return f"no {what} {name!r}{few}"


def _keywords(factory: Callable[..., Any]) -> set[str]:
    """Names of the parameters that accept keyword arguments."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return set()  # Written in C, without a signature.
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name for p in parameters if p.kind in named}
