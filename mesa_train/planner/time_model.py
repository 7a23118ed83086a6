"""Pace: what the choices cost in time, from whole steps on this device.

Operators timed alone (`costs.py`) do not add up to a step: caches, allocations and fused passes differ.
So a few policies that do the same with everything are timed against plain, in turns. The difference
is shared out over the sites by what their operators take alone, over the blocks by their arithmetic.
Without data there is only the arithmetic.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mesa_train.measure.fake_tensors import Fakes
from mesa_train.measure.footprint import arguments, autocasting
from mesa_train.measure.isolation import standing_in
from mesa_train.measure.runner import Runs
from mesa_train.measure.stash_log import Key
from mesa_train.methods.apply import PLAIN

from .candidates import KEEP, REBUILD, Site, also_moved, weights_of
from .op_timings import Costs, seconds_of

if TYPE_CHECKING:
    from .search_space import Prospect

logger = logging.getLogger(__name__)

_ROUNDS = 4
# Names of the policies that are timed beside those of single choices.
CHECKPOINT, CHECKPOINT_CODES = "checkpoint", "checkpoint of codes"


class Pace(NamedTuple):
    """Seconds beyond plain's step. sites: by site and choice. matmuls: of repeating each product.
    blocks: of checkpointing each block and its input's codes, by CHECKPOINT or CHECKPOINT_CODES. bus:
    bytes a second to main memory and back, None where nothing is moved."""

    sites: dict[tuple[Key, int | str], float]
    matmuls: dict[str, float]
    blocks: dict[tuple[str, str], float]
    bus: float | None = None


def pace_of(prospect: Prospect, device: torch.device) -> tuple[float | None, Pace]:
    """Seconds of plain's step, None where it was not timed, and what the choices take."""
    costs = Costs(device, prospect.autocast or torch.float32)
    weights = weights_of(prospect.model)
    alone, matmuls = seconds_of(costs, prospect.sites, weights)
    flops = flops_of(prospect.model, prospect.inputs, prospect.autocast)
    outs, ins = max(weights.values(), default=(256, 256))
    blocks = prospect.plays.blocks
    forwards = {b: costs.flops(flops.get(b, 0), (1024, ins, outs)) for b in blocks}
    plain_s, steps = _steps(prospect)
    found = pace(prospect.sites, alone, matmuls, forwards, steps)
    also_moved(found.sites, prospect.sites)
    return plain_s, found._replace(bus=costs.bus() if prospect.movable else None)


def _steps(prospect: Prospect) -> tuple[float | None, dict[int | str, float]]:
    """Seconds of plain's step, and what others take beyond it; nothing without data."""
    if not prospect.real:
        return None, {}
    asked = {choice: prospect.all(choice) for choice in (8, 4, KEEP)}
    if any(s.product for s in prospect.sites):
        asked[REBUILD] = prospect.all(REBUILD)
    if prospect.plays.blocks:
        asked[CHECKPOINT] = prospect.all(8, "checkpoint, input 8 bits")
        asked[CHECKPOINT_CODES] = prospect.all(8, "checkpoint of codes, input 8 bits")
    runs = Runs(prospect.model, prospect.inputs, prospect.autocast, prospect.loss)
    policies = [prospect.policy(choices) for choices in asked.values()]
    try:
        plain, *others = runs.times([PLAIN, *policies], _ROUNDS)
    except torch.OutOfMemoryError:
        logger.info("plain does not fit this device: plans go without times")
        return None, {}
    # Whatever else the machine does makes a step slower, never faster.
    least = min(plain)
    return least, {c: min(own) - least for c, own in zip(asked, others, strict=True)}


def pace(
    sites: Sequence[Site],
    alone: Mapping[tuple[Key, int | str], float],
    matmuls: Mapping[str, float],
    forwards: Mapping[str, float],
    steps: Mapping[int | str, float],
) -> Pace:
    """Share out what was timed.

    alone, matmuls: seconds of the operators by themselves. forwards: of the blocks' forwards.
    steps: what whole steps took beyond plain's, by the choice of all sites, or CHECKPOINT...; empty
    where nothing was timed.
    """
    again = sum(forwards.values())
    if not steps:
        blocks = {(b, CHECKPOINT): t for b, t in forwards.items()}
        blocks |= {
            (b, CHECKPOINT_CODES): t + sum(alone[s.key, 8] for s in sites if s.block == b)
            for b, t in forwards.items()
        }
        return Pace(dict(alone), dict(matmuls), blocks)
    whole = sum(s.elements for s in sites) or 1
    found: dict[tuple[Key, int | str], float] = {}
    for choice in (8, 4, 2, KEEP):
        own = {s.key: alone[s.key, choice if choice in s.choices() else 8] for s in sites}
        total = sum(own.values())
        # 2 bits take what 4 do, but for what coding them alone takes more.
        more = total - sum(alone[s.key, 4 if 4 in s.choices() else 8] for s in sites)
        took = steps[4] + more if choice == 2 else steps[choice]
        for site in sites:
            if choice in site.choices():
                left = (took - total) * site.elements / whole
                found[site.key, choice] = own[site.key] + left
    found |= {(s.key, REBUILD): 0.0 for s in sites if s.product}
    products = dict(matmuls)
    if products:
        saved = sum(found[s.key, 8] for s in sites if s.product)
        took = max(0.1 * sum(products.values()), steps[REBUILD] - steps[8] + saved)
        products = {p: t * took / sum(products.values()) for p, t in products.items()}
    blocks = {
        # A forward more takes time, whatever a busy machine says.
        (block, kind): max(0.3 * again, steps[kind])
        * (time / again if again else 1 / len(forwards))
        for kind in (CHECKPOINT, CHECKPOINT_CODES)
        if kind in steps
        for block, time in forwards.items()
    }
    return Pace(found, products, blocks)


def flops_of(model: nn.Module, inputs: Any, autocast: torch.dtype | None) -> dict[str, int]:
    """Floating-point operations of each module's forward, by name; without running it."""
    args, kwargs = arguments(inputs)
    fakes = Fakes(torch.device("cpu"))
    args, kwargs = fakes.of(args), fakes.of(kwargs)
    counter = FlopCounterMode(display=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(standing_in(model, fakes))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(autocasting(torch.device("cpu"), autocast))
        stack.enter_context(counter)
        model(*args, **kwargs)
    root = type(model).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(by_operator.values())
        for name, by_operator in counter.get_flop_counts().items()
    }
