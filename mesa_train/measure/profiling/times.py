"""Fit the time model: the seconds that each choice adds to a step, from whole steps on this device.

The times of single operators do not add up to the time of a step: caches, allocations and fused
passes differ. So a few policies with one choice for everything are timed against plain, in turns.
The difference is divided among the candidates by the times of their single operators, and among the
blocks by their floating-point operations. For a model on meta there are only the times of single
operators.

`OpTimings` has the seconds of coding, decoding and recomputing a matmul. It measures them once for
a shape and keeps them in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import time as clock
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mesa_train.codecs.affine import Affine
from mesa_train.measure.fake_tensors import FakeModel
from mesa_train.measure.isolation import isolated
from mesa_train.measure.runner import StepRunner
from mesa_train.measure.stash_log import Key
from mesa_train.measure.step import arguments, autocasting
from mesa_train.methods.apply import PLAIN
from mesa_train.utils.records import provenance

from .blocks import GROUP
from .candidates import KEEP, REBUILD, Candidate, add_offloaded_choices, weights_of

if TYPE_CHECKING:
    from .search_space import SearchSpace

logger = logging.getLogger(__name__)

_ROUNDS = 4
# Names of the timed policies that checkpoint all blocks.
CHECKPOINT, CHECKPOINT_CODES = "checkpoint", "checkpoint of codes"


class TimeModel(NamedTuple):
    """Seconds that the choices add to the plain step.

    Args:
        candidates: seconds by (candidate, choice).
        matmuls: seconds to recompute each product.
        blocks: seconds to checkpoint each block and code its input, by (block, CHECKPOINT or
            CHECKPOINT_CODES).
        host_link: bytes per second to CPU memory and back; None if nothing is offloaded.
    """

    candidates: dict[tuple[Key, int | str], float]
    matmuls: dict[str, float]
    blocks: dict[tuple[str, str], float]
    host_link: float | None = None


def fit_time_model(space: SearchSpace, device: torch.device) -> tuple[float | None, TimeModel]:
    """Time the choices.

    Args:
        space: the choices for one model and batch.
        device: device of the model; meta stands for a typical GPU.

    Returns:
        (seconds of the plain step, None if it was not timed; the time model).
    """
    timings = OpTimings(device, space.autocast or torch.float32)
    weights = weights_of(space.model)
    op_seconds, matmuls = seconds_of(timings, space.candidates, weights)
    flops = flops_of(space.model, space.inputs, space.autocast)
    outs, ins = max(weights.values(), default=(256, 256))
    blocks = space.simulator.blocks
    forwards = {block: timings.flops(flops.get(block, 0), (1024, ins, outs)) for block in blocks}
    plain_s, steps = _steps(space)
    model = times(space.candidates, op_seconds, matmuls, forwards, steps)
    add_offloaded_choices(model.candidates, space.candidates)
    return plain_s, model._replace(host_link=timings.host_link() if space.offloadable else None)


def _steps(space: SearchSpace) -> tuple[float | None, dict[int | str, float]]:
    """Seconds of the plain step, and of other steps beyond it.

    For a model on meta, or if plain does not fit the device, they are None and empty.
    """
    if not space.real:
        return None, {}
    choices_by_name = {choice: space.all(choice) for choice in (8, 4, KEEP)}
    if any(candidate.product for candidate in space.candidates):
        choices_by_name[REBUILD] = space.all(REBUILD)
    if space.simulator.blocks:
        choices_by_name[CHECKPOINT] = space.all(8, "checkpoint, input 8 bits")
        choices_by_name[CHECKPOINT_CODES] = space.all(8, "checkpoint of codes, input 8 bits")
    runner = StepRunner(space.model, space.inputs, space.autocast, space.loss)
    policies = [space.policy(choices) for choices in choices_by_name.values()]
    try:
        plain, *others = runner.times([PLAIN, *policies], _ROUNDS)
    except torch.OutOfMemoryError:
        logger.info("plain does not fit this device: the plan has no times")
        return None, {}
    # Other work on the machine makes a step slower, never faster: the minimum is the best estimate.
    plain_s = min(plain)
    return plain_s, {
        name: min(seconds) - plain_s for name, seconds in zip(choices_by_name, others, strict=True)
    }


def times(
    candidates: Sequence[Candidate],
    op_seconds: Mapping[tuple[Key, int | str], float],
    matmuls: Mapping[str, float],
    forwards: Mapping[str, float],
    steps: Mapping[int | str, float],
) -> TimeModel:
    """Divide the measured times among candidates and blocks.

    Args:
        candidates: all candidates.
        op_seconds: seconds of the single operators, by (candidate, choice).
        matmuls: seconds to recompute each Linear, timed alone.
        forwards: seconds of the forward of each block.
        steps: seconds of whole steps beyond the plain step, by the choice of all candidates, or
            CHECKPOINT, or CHECKPOINT_CODES; empty if nothing was timed.
    """
    forward_s = sum(forwards.values())
    if not steps:
        blocks = {(block, CHECKPOINT): seconds for block, seconds in forwards.items()}
        blocks |= {
            (block, CHECKPOINT_CODES): seconds
            + sum(
                op_seconds[candidate.key, 8] for candidate in candidates if candidate.block == block
            )
            for block, seconds in forwards.items()
        }
        return TimeModel(dict(op_seconds), dict(matmuls), blocks)
    elements = sum(candidate.elements for candidate in candidates) or 1
    by_choice: dict[tuple[Key, int | str], float] = {}
    choices: list[int | str] = [*GROUP, KEEP]
    for choice in choices:
        op_times = {
            candidate.key: op_seconds[candidate.key, choice if choice in candidate.choices() else 8]
            for candidate in candidates
        }
        total = sum(op_times.values())
        # Bits without a step of their own take the time of 4 bits plus the difference of their single
        # operators.
        more = total - sum(
            op_seconds[candidate.key, 4 if 4 in candidate.choices() else 8]
            for candidate in candidates
        )
        step_s = steps[choice] if choice in steps else steps[4] + more
        for candidate in candidates:
            if choice in candidate.choices():
                rest = (step_s - total) * candidate.elements / elements
                by_choice[candidate.key, choice] = op_times[candidate.key] + rest
    by_choice |= {(candidate.key, REBUILD): 0.0 for candidate in candidates if candidate.product}
    products = dict(matmuls)
    if products:
        saved = sum(by_choice[candidate.key, 8] for candidate in candidates if candidate.product)
        step_s = max(0.1 * sum(products.values()), steps[REBUILD] - steps[8] + saved)
        products = {
            product: seconds * step_s / sum(products.values())
            for product, seconds in products.items()
        }
    blocks = {
        # A second forward takes at least 0.3 of its estimate, even if a busy machine measures less.
        (block, kind): max(0.3 * forward_s, steps[kind])
        * (time / forward_s if forward_s else 1 / len(forwards))
        for kind in (CHECKPOINT, CHECKPOINT_CODES)
        if kind in steps
        for block, time in forwards.items()
    }
    return TimeModel(by_choice, products, blocks)


def flops_of(model: nn.Module, inputs: Any, autocast: torch.dtype | None) -> dict[str, int]:
    """Count the floating-point operations of each module's forward, by name, on fake tensors."""
    args, kwargs = arguments(inputs)
    fake_model = FakeModel(torch.device("cpu"))
    args, kwargs = fake_model.of(args), fake_model.of(kwargs)
    counter = FlopCounterMode(display=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(isolated(model, fake_model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(autocasting(torch.device("cpu"), autocast))
        stack.enter_context(counter)
        model(*args, **kwargs)
    root = type(model).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(by_operator.values())
        for name, by_operator in counter.get_flop_counts().items()
    }


# Values of an A100 for a model on meta: bytes per second of memory, operations per second of
# matmuls, and bytes per second of the link to CPU memory (PCIe 4 with 16 lanes).
_BANDWIDTH, _MATMULS, _HOST_LINK = 1.3e12, 2e14, 2.5e10
# Bytes of the timed copy.
_COPY = 1 << 26
_REPEATS = 5
# Matmuls are timed on at most this many rows; more rows take time in proportion.
_ROWS = 4096


class OpTimings:
    """Seconds of single operations on one device.

    Args:
        device: device of the operations; meta stands for a typical GPU.
        dtype: dtype of the tensors.
        path: file of the cache; default: `timings.json` in `$XDG_CACHE_HOME/mesa_train`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, path: Path | None = None) -> None:
        self.device, self.dtype = device, dtype
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = path or folder / "mesa_train" / "timings.json"
        self._measured: dict[str, float] = {}
        if device.type != "meta":
            source = provenance(device)
            parts = [source["device"], source["versions"]["torch"], source["threads"], str(dtype)]
            self._section = "|".join(map(str, parts))
            self._measured = self._read().get(self._section, {})

    def code(self, rows: int, cols: int, bits: int) -> float:
        """Seconds to code a (rows, cols) tensor and to decode it once."""
        if self.device.type == "meta":
            # Read the tensor, write the codes, read the codes, write the tensor.
            return rows * cols * (2 * self.dtype.itemsize + bits / 4) / _BANDWIDTH
        timed_rows = min(rows, _ROWS)
        return self._cached(
            f"code {timed_rows}x{cols} {bits}", lambda: self._code(timed_rows, cols, bits)
        ) * (rows / timed_rows)

    def matmul(self, rows: int, inner: int, cols: int) -> float:
        """Seconds of a (rows, inner) by (inner, cols) product."""
        if self.device.type == "meta":
            return 2 * rows * inner * cols / _MATMULS
        timed_rows = min(rows, _ROWS)
        key = f"matmul {timed_rows}x{inner}x{cols}"
        return self._cached(key, lambda: self._matmul(timed_rows, inner, cols)) * (
            rows / timed_rows
        )

    def flops(self, count: int, matmul: tuple[int, int, int]) -> float:
        """Seconds of `count` floating-point operations, at the speed of a matmul.

        Args:
            count: number of operations.
            matmul: (rows, inner, cols) of the matmul.
        """
        rows, inner, cols = matmul
        return count * self.matmul(rows, inner, cols) / (2 * rows * inner * cols)

    def host_link(self) -> float:
        """Bytes per second between a GPU and pinned CPU memory, in the slower direction."""
        if self.device.type == "meta":
            return _HOST_LINK
        return _COPY / self._cached("host_link", self._copy_seconds)

    def _copy_seconds(self) -> float:
        """Seconds of a copy of _COPY bytes, in the slower direction."""
        host = torch.empty(_COPY, dtype=torch.uint8, pin_memory=True)
        on_device = torch.empty(_COPY, dtype=torch.uint8, device=self.device)
        to_host = self._time(lambda: host.copy_(on_device, non_blocking=True))
        return max(to_host, self._time(lambda: on_device.copy_(host, non_blocking=True)))

    def _code(self, rows: int, cols: int, bits: int) -> float:
        """Measure the seconds to code and decode a random tensor."""
        codec = Affine(bits, GROUP[bits], stochastic=bits < 8, dither=bits < 8)
        x = torch.randn(rows, cols, device=self.device).to(self.dtype)
        return self._time(lambda: codec.decode(codec.encode(x), cols, self.dtype))

    def _matmul(self, rows: int, inner: int, cols: int) -> float:
        """Measure the seconds of a matmul, with the cast of its float32 weight."""
        x = torch.randn(rows, inner, device=self.device).to(self.dtype)
        weight = torch.randn(cols, inner, device=self.device)
        return self._time(lambda: F.linear(x, weight.to(self.dtype)))

    def _time(self, run: Callable[[], Any]) -> float:
        """The median seconds of _REPEATS calls, after two that warm up."""
        seconds = []
        with torch.no_grad():
            for number in range(_REPEATS + 2):
                self._synchronize()
                start = clock.perf_counter()
                run()
                self._synchronize()
                if number >= 2:
                    seconds.append(clock.perf_counter() - start)
        return statistics.median(seconds)

    def _synchronize(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _cached(self, key: str, measure: Callable[[], float]) -> float:
        """The seconds of an operation; measured if the cache does not have them."""
        if key not in self._measured:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                self._measured[key] = measure()
            self._write()
        return self._measured[key]

    def _read(self) -> dict[str, dict[str, float]]:
        """The cache file: seconds by operation, by device and versions."""
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}  # The file is missing or incomplete: measure again.

    def _write(self) -> None:
        """Write the measured seconds to the cache file."""
        content = {**self._read(), self._section: self._measured}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(content, indent=1))
            partial.replace(self.path)
        except OSError:
            return  # Without a cache file the next process measures again.


def seconds_of(
    timings: OpTimings, candidates: Sequence[Candidate], weights: Mapping[str, tuple[int, int]]
) -> tuple[dict[tuple[Key, int | str], float], dict[str, float]]:
    """Time the single operators of all candidates.

    Args:
        timings: the timings of the device.
        candidates: all candidates.
        weights: (out, in) of the weight of each Linear, by its name.

    Returns:
        (seconds by (candidate, choice), seconds to recompute each product).
    """
    seconds: dict[tuple[Key, int | str], float] = {}
    products: dict[str, float] = {}
    for candidate in candidates:
        for choice in candidate.choices():
            seconds[candidate.key, choice] = 0.0
            if isinstance(choice, int):
                seconds[candidate.key, choice] = sum(
                    timings.code(rows, cols, choice) for rows, cols in candidate.matrices
                )
        if candidate.product and candidate.product not in products:
            outs, ins = weights[candidate.product]
            # q, k and v are parts of one output, so this output has as many rows as all parts
            # together.
            parts = [c.elements for c in candidates if c.product == candidate.product]
            products[candidate.product] = timings.matmul(max(1, sum(parts) // outs), ins, outs)
    return seconds, products
