"""`python:MODULE.FACTORY` and `python:PATH.py:FACTORY`: a model of the user's own, with inputs for it.

The factory returns a module or (module, inputs), inputs being a tensor, a tuple of arguments, a dict
of keyword arguments, or a function of the batch size that makes one. It is given batch_size and
image_size if it takes them. Whatever it raises becomes one line that says where.
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
    """Inputs from a factory that takes no batch_size."""

    inputs: Any


def from_factory(name: str, image_size: int | None, batch_size: int) -> tuple[nn.Module, Any]:
    """(model, inputs or a function of the batch size) from `name` without its scheme; inputs that
    the factory could make of one size alone are `Fixed`.

    On the meta device a factory that needs values is called again on the CPU. Raises ValueError for
    a module or factory that is not there or fails, TypeError for what it must not return.
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
    """What a factory returns that failed on the meta device, and would not on a real one."""
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
    """Inputs from a function of the batch size; ValueError, saying where, if it fails."""
    try:
        return make(batch_size)
    except Exception as error:
        if torch.empty(0).device.type == "meta":
            with torch.device("cpu"):
                return made(name, make, batch_size)
        raise ValueError(f"{name}: inputs of {batch_size} failed: {one_line(error)}") from error


def check_inputs(name: str, model: nn.Module, inputs: Any) -> None:
    """TypeError if there is no tensor among the inputs, ValueError if the model's forward does not
    take them."""
    if not any(True for _ in _tensors(inputs)):
        raise TypeError(
            f"{name}: inputs must be a tensor, a tuple of arguments, a dict of keyword arguments or a "
            f"function of the batch size that makes one, got {type(inputs).__name__} without a tensor"
        )
    args, kwargs = arguments(inputs)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return  # Written in C, with no signature to read.
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        taken = f"{type(model).__name__}.forward({', '.join(signature.parameters)})"
        listed = isinstance(inputs, tuple | list) and len(inputs) > 1
        hint = "; for one argument that is a list, return ([...],) or a dict" if listed else ""
        raise ValueError(f"{name}: its inputs do not fit {taken}: {error}{hint}") from error


def _tensors(inputs: Any) -> Iterator[Tensor]:
    yield from tensors_in(inputs)


def _module(name: str) -> tuple[Any, str]:
    """The module that a name is in, imported, and the name of the factory in it."""
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
        # Something that the user's own module imports may be missing too: say which.
        raise ValueError(f"python:{name}: no module named {error.name!r} to import") from error
    except SyntaxError as error:
        where = f"{Path(error.filename or '').name}, line {error.lineno}"
        raise ValueError(f"python:{name}: {error.msg} ({where})") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"python:{name} cannot be imported: {one_line(error)}") from error


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is none of the known ones, with those that are close."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.6)
    if near:
        return f"no {what} {name!r}; close names: {', '.join(near)}"
    few = f"; there is {', '.join(names)}" if 0 < len(names) <= 8 else ""
    return f"no {what} {name!r}{few}"


def _keywords(factory: Callable[..., Any]) -> set[str]:
    """Names of the parameters that can be given by keyword."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return set()  # Written in C, with no signature to read.
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name for p in parameters if p.kind in named}
