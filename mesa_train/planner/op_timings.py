"""What coding, decoding and repeating a matmul cost on this device, in seconds.

Measured once for a shape and kept in a file of the user's cache folder; for a model without data,
taken from the arithmetic of a typical GPU.
"""

from __future__ import annotations

import json
import os
import statistics
import time as clock
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mesa_train.codecs.affine import Affine
from mesa_train.measure.stash_log import Key
from mesa_train.utils.records import provenance

from .blocks import GROUP
from .candidates import Candidate

# Bytes per second of memory, operations per second of matmuls, and bytes per second of the link to CPU
# memory (PCIe 4 with 16 lanes) of an A100, where nothing can be measured.
_BANDWIDTH, _MATMULS, _BUS = 1.3e12, 2e14, 2.5e10
# Bytes of a copy that is timed.
_COPY = 1 << 26
_ROUNDS = 5
# Matmuls are timed on at most this many rows: beyond, time goes in proportion.
_ROWS = 4096


class OpTimings:
    """Seconds of single operations on one device.

    device: where they run; meta stands for a typical GPU. dtype: of the tensors. path: of the
    cache; default: `timings.json` in `$XDG_CACHE_HOME/mesa_train`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, path: Path | None = None) -> None:
        self.device, self.dtype = device, dtype
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = path or folder / "mesa_train" / "timings.json"
        self._known: dict[str, float] = {}
        if device.type != "meta":
            source = provenance(device)
            about = [source["device"], source["versions"]["torch"], source["threads"], str(dtype)]
            self._where = "|".join(map(str, about))
            self._known = self._read().get(self._where, {})

    def code(self, rows: int, cols: int, bits: int) -> float:
        """Seconds to code a (rows, cols) tensor and to decode it once."""
        if self.device.type == "meta":
            # Read, write codes, read codes, write.
            return rows * cols * (2 * self.dtype.itemsize + bits / 4) / _BANDWIDTH
        few = min(rows, _ROWS)
        return self._cached(f"code {few}x{cols} {bits}", lambda: self._code(few, cols, bits)) * (
            rows / few
        )

    def matmul(self, rows: int, inner: int, cols: int) -> float:
        """Seconds of a (rows, inner) by (inner, cols) product."""
        if self.device.type == "meta":
            return 2 * rows * inner * cols / _MATMULS
        few = min(rows, _ROWS)
        key = f"matmul {few}x{inner}x{cols}"
        return self._cached(key, lambda: self._matmul(few, inner, cols)) * (rows / few)

    def flops(self, count: int, matmul: tuple[int, int, int]) -> float:
        """Seconds of so many floating-point operations, at the pace of a (rows, inner, cols)
        product."""
        rows, inner, cols = matmul
        return count * self.matmul(rows, inner, cols) / (2 * rows * inner * cols)

    def host_link(self) -> float:
        """Bytes per second between a GPU and pinned CPU memory, in the slower direction."""
        if self.device.type == "meta":
            return _BUS
        return _COPY / self._cached("host_link", self._bus)

    def _bus(self) -> float:
        host = torch.empty(_COPY, dtype=torch.uint8, pin_memory=True)
        own = torch.empty(_COPY, dtype=torch.uint8, device=self.device)
        out = self._time(lambda: host.copy_(own, non_blocking=True))
        return max(out, self._time(lambda: own.copy_(host, non_blocking=True)))

    def _code(self, rows: int, cols: int, bits: int) -> float:
        codec = Affine(bits, GROUP[bits], stochastic=bits < 8)
        x = torch.randn(rows, cols, device=self.device).to(self.dtype)
        return self._time(lambda: codec.decode(codec.encode(x), cols, self.dtype))

    def _matmul(self, rows: int, inner: int, cols: int) -> float:
        x = torch.randn(rows, inner, device=self.device).to(self.dtype)
        weight = torch.randn(cols, inner, device=self.device)
        return self._time(lambda: F.linear(x, weight.to(self.dtype)))

    def _time(self, run: Callable[[], Any]) -> float:
        taken = []
        with torch.no_grad():
            for number in range(_ROUNDS + 2):
                self._synchronize()
                start = clock.perf_counter()
                run()
                self._synchronize()
                if number >= 2:
                    taken.append(clock.perf_counter() - start)
        return statistics.median(taken)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _cached(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self._known:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                self._known[key] = measure()
            self._write()
        return self._known[key]

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}  # Not there yet, or cut short: measured anew.

    def _write(self) -> None:
        everything = {**self._read(), self._where: self._known}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(everything, indent=1))
            partial.replace(self.path)
        except OSError:
            return  # A folder that cannot be written to costs time, no more.


def seconds_of(
    timings: OpTimings, candidates: Sequence[Candidate], weights: Mapping[str, tuple[int, int]]
) -> tuple[dict[tuple[Key, int | str], float], dict[str, float]]:
    """(seconds by candidate and choice, seconds of repeating each product).

    weights: (out, in) of the Linears by name.
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
            # Of q, k and v each is a part of the product: it has as many rows as all of them.
            parts = [s.elements for s in candidates if s.product == candidate.product]
            products[candidate.product] = timings.matmul(max(1, sum(parts) // outs), ins, outs)
    return seconds, products
