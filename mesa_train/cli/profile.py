"""`mesa-train profile`: show saved bytes and operations by module, and how tensors are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common

if TYPE_CHECKING:
    from mesa_train.loading.model import Loaded
    from mesa_train.policy import Policy


def profile(
    model: common.Model,
    policy: Annotated[
        str, typer.Option(help="A preset, checkpoint, or a policy's YAML file.")
    ] = "mesa8",
    diff: Annotated[
        str | None, typer.Option(help="Another policy to compare with, instead of plain.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option(min=0, help="Levels of the module tree to show; default: all.")
    ] = None,
    batch_size: common.BatchSize = 8,
    image_size: common.ImageSize = None,
    dtype: common.Precision = common.DType.auto,
    device: common.Device = None,
    fake: common.Fake = False,
    as_json: common.Json = False,
) -> None:
    """Show where the saved bytes and the operations are, by operator and module.

    Compares plain with a policy, or two policies, and shows how each tensor is stored and why.
    """
    with common.one_line_errors():
        from mesa_train.measure.flops import flops
        from mesa_train.measure.footprint import footprint

        names = ("plain", policy) if diff is None else (policy, diff)
        methods = [_method(name) for name in names]
        loaded, target = common.loading(model, batch_size, image_size, device, fake)
        dtype = common.resolved(loaded, dtype, target, fake)
        common.check_precision(loaded, dtype, target, fake)
        how = {
            "autocast": common.autocast_of(dtype),
            "device": target if fake else None,
            "fake": fake,
        }
        footprints = []
        with common.progress_bar() as progress:
            for step, (name, method) in enumerate(zip(names, methods, strict=True)):
                progress(name, step, 3)
                footprints.append(
                    footprint(loaded.model, loaded.inputs, policy=method, **how)  # type: ignore[arg-type]
                )
            progress("operations", 2, 3)
            operations = flops(loaded.model, loaded.inputs, **how)  # type: ignore[arg-type]
        first, second = footprints
        parts = _parts(loaded)
        if as_json:
            setting = common.setting_of(loaded, dtype, target, fake)
            keys = ("plain", "with_policy") if diff is None else ("with_policy", "with_diff")
            both = dict(zip(keys, (first.to_dict(), second.to_dict()), strict=True))
            both |= {"flops": operations.to_dict()}
            if parts:
                both["energy"] = _energy(loaded.model, parts)
            common.show_json({**setting, "policy": policy, "diff": diff, **both})
            return
        from mesa_train.report import terminal

        labels = (_label(names[0]), _label(names[1]))
        common.show(
            common.title_of(loaded, dtype, target),
            terminal.by_operator(first, second, labels),
            f"Modules with their submodules. The forward of {loaded.batch} inputs has "
            f"{operations.total / 1e9:.3f} GFLOPs; a multiply-add is two:",
            terminal.by_module(first, second, labels, depth, operations),
        )
        if parts:
            common.show(_ENERGY, terminal.energy(parts, loaded.model.energy_of))  # type: ignore[arg-type]
        for label, counted in zip(labels, footprints, strict=True):
            table = terminal.stored(counted)
            if table is not None:
                common.show(f"Saved tensors of {label}, and how they are stored:", table)
        common.show(*first.notes)


_ENERGY = (
    "Operations of one image as the authors count, and the energy of these operations in 45 nm: "
    "3.7 pJ a multiplication, 0.9 pJ an addition. An estimate from counts, not a measurement:"
)


def _parts(loaded: Loaded) -> dict[str, tuple[int, int]]:
    """(multiplications, additions) of one image by part of an EcoFormer; empty for other models."""
    count: Any = getattr(loaded.model, "operations_by_part", None)
    if count is None:
        return {}
    shape = getattr(loaded.inputs, "shape", None)
    found: dict[str, tuple[int, int]] = count(None if shape is None else tuple(shape[-2:]))
    return found


def _energy(model: Any, parts: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """The operations and the energy of one image, as plain values."""
    return {
        "parts": {
            name: {"multiplications": mul, "additions": add, "pj": model.energy_of(mul, add)}
            for name, (mul, add) in parts.items()
        },
        "pj": sum(model.energy_of(*part) for part in parts.values()),
    }


def _method(name: str) -> Policy | str:
    """A policy from its file, or a method's name; ValueError with the choices for another name."""
    from mesa_train.methods.apply import check_method
    from mesa_train.policy import Policy

    if name.endswith((".yaml", ".yml")):
        return Policy.from_yaml(name)
    check_method(name)
    return name


def _label(name: str) -> str:
    """A name that is short enough for a column."""
    return name if len(name) <= 24 else name.rpartition("/")[2][-24:]
