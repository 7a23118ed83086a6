"""Pace: what the choices cost in time, from whole steps on this device.

Operators timed alone (`op_timings.py`) do not add up to a step: caches, allocations and fused passes differ.
So a few policies that do the same with everything are timed against plain, in turns. The difference
is shared out over the candidates by what their operators take alone, over the blocks by their arithmetic.
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

from mesa_train.measure.fake_tensors import FakeModel
from mesa_train.measure.footprint import arguments, autocasting
from mesa_train.measure.isolation import isolated
from mesa_train.measure.runner import Runs
from mesa_train.measure.stash_log import Key
from mesa_train.methods.apply import PLAIN

from .candidates import KEEP, REBUILD, Candidate, also_offloaded, weights_of
from .op_timings import OpTimings, seconds_of

if TYPE_CHECKING:
    from .search_space import SearchSpace

logger = logging.getLogger(__name__)

_ROUNDS = 4
# Names of the policies that are timed beside those of single choices.
CHECKPOINT, CHECKPOINT_CODES = "checkpoint", "checkpoint of codes"


class TimeModel(NamedTuple):
    """Seconds beyond plain's step. candidates: by candidate and choice. matmuls: of repeating each product.
    blocks: of checkpointing each block and its input's codes, by CHECKPOINT or CHECKPOINT_CODES. host_link:
    bytes a second to CPU memory and back, None where nothing is offloaded."""

    candidates: dict[tuple[Key, int | str], float]
    matmuls: dict[str, float]
    blocks: dict[tuple[str, str], float]
    host_link: float | None = None


def fit_time_model(space: SearchSpace, device: torch.device) -> tuple[float | None, TimeModel]:
    """Seconds of plain's step, None where it was not timed, and what the choices take."""
    timings = OpTimings(device, space.autocast or torch.float32)
    weights = weights_of(space.model)
    alone, matmuls = seconds_of(timings, space.candidates, weights)
    flops = flops_of(space.model, space.inputs, space.autocast)
    outs, ins = max(weights.values(), default=(256, 256))
    blocks = space.simulator.blocks
    forwards = {b: timings.flops(flops.get(b, 0), (1024, ins, outs)) for b in blocks}
    plain_s, steps = _steps(space)
    found = times(space.candidates, alone, matmuls, forwards, steps)
    also_offloaded(found.candidates, space.candidates)
    return plain_s, found._replace(host_link=timings.host_link() if space.offloadable else None)


def _steps(space: SearchSpace) -> tuple[float | None, dict[int | str, float]]:
    """Seconds of plain's step, and what others take beyond it; nothing without data."""
    if not space.real:
        return None, {}
    asked = {choice: space.all(choice) for choice in (8, 4, KEEP)}
    if any(s.product for s in space.candidates):
        asked[REBUILD] = space.all(REBUILD)
    if space.simulator.blocks:
        asked[CHECKPOINT] = space.all(8, "checkpoint, input 8 bits")
        asked[CHECKPOINT_CODES] = space.all(8, "checkpoint of codes, input 8 bits")
    runs = Runs(space.model, space.inputs, space.autocast, space.loss)
    policies = [space.policy(choices) for choices in asked.values()]
    try:
        plain, *others = runs.times([PLAIN, *policies], _ROUNDS)
    except torch.OutOfMemoryError:
        logger.info("plain does not fit this device: plans go without times")
        return None, {}
    # Whatever else the machine does makes a step slower, never faster.
    least = min(plain)
    return least, {c: min(own) - least for c, own in zip(asked, others, strict=True)}


def times(
    candidates: Sequence[Candidate],
    alone: Mapping[tuple[Key, int | str], float],
    matmuls: Mapping[str, float],
    forwards: Mapping[str, float],
    steps: Mapping[int | str, float],
) -> TimeModel:
    """Share out what was timed.

    alone, matmuls: seconds of the operators by themselves. forwards: of the blocks' forwards.
    steps: what whole steps took beyond plain's, by the choice of all candidates, or CHECKPOINT...; empty
    where nothing was timed.
    """
    again = sum(forwards.values())
    if not steps:
        blocks = {(b, CHECKPOINT): t for b, t in forwards.items()}
        blocks |= {
            (b, CHECKPOINT_CODES): t + sum(alone[s.key, 8] for s in candidates if s.block == b)
            for b, t in forwards.items()
        }
        return TimeModel(dict(alone), dict(matmuls), blocks)
    whole = sum(s.elements for s in candidates) or 1
    found: dict[tuple[Key, int | str], float] = {}
    for choice in (8, 4, 2, KEEP):
        own = {s.key: alone[s.key, choice if choice in s.choices() else 8] for s in candidates}
        total = sum(own.values())
        # 2 bits take what 4 do, but for what coding them alone takes more.
        more = total - sum(alone[s.key, 4 if 4 in s.choices() else 8] for s in candidates)
        took = steps[4] + more if choice == 2 else steps[choice]
        for candidate in candidates:
            if choice in candidate.choices():
                left = (took - total) * candidate.elements / whole
                found[candidate.key, choice] = own[candidate.key] + left
    found |= {(s.key, REBUILD): 0.0 for s in candidates if s.product}
    products = dict(matmuls)
    if products:
        saved = sum(found[s.key, 8] for s in candidates if s.product)
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
    return TimeModel(found, products, blocks)


def flops_of(model: nn.Module, inputs: Any, autocast: torch.dtype | None) -> dict[str, int]:
    """Floating-point operations of each module's forward, by name; without running it."""
    args, kwargs = arguments(inputs)
    fakes = FakeModel(torch.device("cpu"))
    args, kwargs = fakes.of(args), fakes.of(kwargs)
    counter = FlopCounterMode(display=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(isolated(model, fakes))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(autocasting(torch.device("cpu"), autocast))
        stack.enter_context(counter)
        model(*args, **kwargs)
    root = type(model).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(by_operator.values())
        for name, by_operator in counter.get_flop_counts().items()
    }
