"""The choice for every candidate at once: an integer program, solved by HiGHS to a proven gap.

Minimise time + price * error variance (or the peak, or time alone) such that at every moment of the
step the live bytes fit, the added time and the added variance stay within their bounds, a candidate is
rebuilt only where the matmul that makes it is repeated, the stashes of a block are chosen only where
the block is neither checkpointed nor left to PyTorch, and what the link to CPU memory cannot carry
while the device computes is waited for. ImportError, naming the extra, without scipy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mesa_train.measure.profiling.blocks import STASHES, Block
from mesa_train.measure.profiling.candidates import REBUILD, Candidate, under_way
from mesa_train.measure.stash_log import BLOCK, Key

# Objectives.
COST, PEAK = "cost", "peak"
# Bytes of a unit of memory in the program, so that its rows are of one magnitude.
_UNIT = 2.0**20
# Milliseconds that the forward waits for the link, and the backward: no names of modules.
_OUT, _BACK = "host link out", "host link back"
# A column: a candidate's or block's choice, a product that is repeated, both together, the peak, a wait.
_Name = tuple[Key, int | str] | tuple[Key, int | str, str] | str


class Moment(NamedTuple):
    """Bytes live beyond those of the first `stored` stashes, where `block` is in `mode` (None:
    whatever is chosen)."""

    fixed: float
    stored: int
    block: str | None = None
    mode: str | None = None


class HostLink(NamedTuple):
    """The way to CPU memory. forward_s, backward_s: of arithmetic that hides what goes out, and what
    comes back. room: most bytes there at once, None for any."""

    bytes_per_s: float
    forward_s: float
    backward_s: float
    room: int | None = None

    def waits(self, offloaded_bytes: float) -> float:
        """Seconds that a step waits for so many bytes."""
        taken = offloaded_bytes / self.bytes_per_s
        return max(0.0, taken - self.forward_s) + max(0.0, taken - self.backward_s)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is chosen from, and what it costs.

    seconds, variance: by candidate and choice; the variance is of the gradient, relative to its square.
    matmul_s: seconds of repeating a product. coupled: variance that a choice of a source adds if
    something is rebuilt from it. moments: when how much is live. order: the candidates of the stashes
    that the forward stores, each with its share of the candidate's bytes; (block, BLOCK, "begin") stands
    where a block begins. host_link: where stashes may be offloaded.
    """

    candidates: Sequence[Candidate]
    seconds: Mapping[tuple[Key, int | str], float]
    variance: Mapping[tuple[Key, int | str], float]
    matmul_s: Mapping[str, float]
    coupled: Mapping[tuple[Key, int | str], float]
    moments: Sequence[Moment]
    order: Sequence[tuple[Key, float]]
    blocks: Sequence[Block] = ()
    host_link: HostLink | None = None

    def offloaded(self) -> dict[tuple[Key, int | str], float]:
        """Bytes that go to CPU memory, by candidate or block and choice, of those that do."""
        candidates = {
            (s.key, c): float(s.offloaded_bytes(c)) for s in self.candidates for c in s.choices()
        }
        blocks = {
            (b.key, m): float(w.offloaded_bytes) for b in self.blocks for m, w in b.options.items()
        }
        return {name: size for name, size in (candidates | blocks).items() if size}

    def choices(self) -> dict[Key, list[int | str]]:
        """What there is to choose from for every candidate and block."""
        found = {s.key: s.choices() for s in self.candidates}
        return found | {b.key: [STASHES, *b.options] for b in self.blocks}


@dataclasses.dataclass(frozen=True)
class Solution:
    """choices: by candidate and block; none for the candidates of a block that are not chosen one by one.
    peak_bytes: of the moments as given. seconds, variance: of the choices. gap: how far from the
    optimum it may be, relative to it."""

    choices: dict[Key, int | str]
    peak_bytes: float
    seconds: float
    variance: float
    gap: float

    def cost(self, price: float) -> float:
        """Seconds, and variance at `price` seconds a unit."""
        return self.seconds + price * self.variance

    def within(self, max_seconds: float | None, max_variance: float | None) -> bool:
        """Whether it stays within the bounds, of which None is none."""
        return (max_seconds is None or self.seconds <= max_seconds) and (
            max_variance is None or self.variance <= max_variance
        )


def solve(
    problem: Problem,
    *,
    budget: float | None = None,
    max_seconds: float | None = None,
    max_variance: float | None = None,
    objective: str = COST,
    price: float = 0.0,
    limit_s: float = 20.0,
) -> Solution | None:
    """The best choices, or None if there are none within the bounds.

    budget: most bytes live at any moment. max_seconds, max_variance: of the choices together.
    price: seconds that a unit of variance is worth. objective: COST minimises seconds and priced
    variance, PEAK the highest moment.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array
    except ImportError as error:
        raise ImportError("planning needs scipy: pip install 'mesa_train[plan]'") from error

    if budget is not None and budget < 0:
        return None
    program = _Program(problem)
    columns = program.columns
    if max_seconds is not None:
        program.add(program.seconds, -math.inf, max_seconds)
    if max_variance is not None:
        # Scaled up: the solver's tolerances are absolute.
        scaled = {name: 1e3 * value for name, value in program.variance.items()}
        program.add(scaled, -math.inf, 1e3 * max_variance)
    count = len(columns)
    goal, whole, upper = np.zeros(count), np.ones(count), np.ones(count)
    for name, value in program.goal(objective, price).items():
        goal[columns[name]] = value
    for name in (PEAK, *program.waits):
        whole[columns[name]] = 0
        upper[columns[name]] = math.inf
    if budget is not None:
        upper[columns[PEAK]] = budget / _UNIT
    rows, cols, values = zip(*program.entries, strict=True)
    matrix = coo_array((values, (rows, cols)), shape=(len(program.low), count)).tocsr()
    with _silent():
        found = milp(
            goal,
            constraints=LinearConstraint(matrix, program.low, program.high),
            bounds=Bounds(np.zeros(count), upper),
            integrality=whole,
            options={"time_limit": limit_s, "mip_rel_gap": 1e-3},
        )
    if found.x is None:
        return None
    chosen = {
        key: max(choices, key=lambda c: found.x[columns[key, c]])
        for key, choices in problem.choices().items()
    }
    for candidate in problem.candidates:
        if (
            candidate.block is not None
            and chosen.get((candidate.block, BLOCK, ""), STASHES) != STASHES
        ):
            del chosen[candidate.key]
    return score(problem, chosen, float(found.mip_gap or 0.0))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within the context nothing reaches the process's stdout: HiGHS writes remarks of its own there,
    whatever it is told, and stdout is for results."""
    sys.stdout.flush()
    own = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)


class _Program:
    """The rows of a problem: a candidate has one choice, a rebuilt one needs its product, every moment
    stays below the peak."""

    def __init__(self, problem: Problem) -> None:
        self.entries: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []
        products = list(dict.fromkeys(s.product for s in problem.candidates if s.product))
        coupled = {k: v for k, v in problem.coupled.items() if v > 0}
        links = _links(problem, coupled)
        names: list[_Name] = [(k, c) for k, choices in problem.choices().items() for c in choices]
        self.waits = (_OUT, _BACK) if problem.host_link is not None else ()
        names += [*products, *links, PEAK, *self.waits]
        self.columns = {name: index for index, name in enumerate(names)}
        blocks = {block.name: block.key for block in problem.blocks}
        for key, choices in problem.choices().items():
            if key[1] == BLOCK:
                self.add({(key, c): 1.0 for c in choices}, 1, 1)
        for candidate in problem.candidates:
            one: dict[_Name, float] = {(candidate.key, c): 1.0 for c in candidate.choices()}
            if candidate.block in blocks:
                # Chosen where its block's stashes are, and only there.
                self.add({**one, (blocks[candidate.block], STASHES): -1.0}, 0, 0)
            else:
                self.add(one, 1, 1)
            if candidate.product:
                self.add({(candidate.key, REBUILD): 1.0, candidate.product: -1.0}, -math.inf, 0)
        for link in links:
            # The variance comes with the choice and the repetition together.
            key, choice, product = link
            self.add({(key, choice): 1.0, product: 1.0, link: -1.0}, -math.inf, 1)
        for fixed, sizes in _moments(problem):
            row: dict[_Name, float] = {name: size / _UNIT for name, size in sizes.items()}
            self.add({**row, PEAK: -1.0}, -math.inf, -fixed / _UNIT)
        self.seconds: dict[_Name, float] = {p: problem.matmul_s[p] for p in products}
        if problem.host_link is not None:
            self._add_host_link(problem.offloaded(), problem.host_link)
        self.variance: dict[_Name, float] = {link: coupled[link[0], link[1]] for link in links}
        for candidate in problem.candidates:
            for choice in candidate.choices():
                self.seconds[candidate.key, choice] = problem.seconds[candidate.key, choice]
                self.variance[candidate.key, choice] = problem.variance[candidate.key, choice]
        for block in problem.blocks:
            for mode, option in block.options.items():
                self.seconds[block.key, mode] = option.seconds
                self.variance[block.key, mode] = option.variance

    def add(self, row: Mapping[_Name, float], least: float, most: float) -> None:
        """A row: the sum of its columns times these factors is within the bounds."""
        self.entries.extend((len(self.low), self.columns[n], value) for n, value in row.items())
        self.low.append(least)
        self.high.append(most)

    def _add_host_link(
        self, offloaded: Mapping[tuple[Key, int | str], float], host_link: HostLink
    ) -> None:
        """What does not go out in the forward's time, or come back in the backward's, is waited for."""
        taken: dict[_Name, float] = {
            n: 1e3 * size / host_link.bytes_per_s for n, size in offloaded.items()
        }
        for wait, hidden in ((_OUT, host_link.forward_s), (_BACK, host_link.backward_s)):
            self.add({**taken, wait: -1.0}, -math.inf, 1e3 * hidden)
            self.seconds[wait] = 1e-3
        if host_link.room is not None:
            sizes: dict[_Name, float] = {name: size / _UNIT for name, size in offloaded.items()}
            self.add(sizes, -math.inf, host_link.room / _UNIT)

    def goal(self, objective: str, price: float) -> dict[_Name, float]:
        """What is minimised; what comes second is a thousandth of it or less."""
        if objective == PEAK:
            scale = sum(map(abs, self.seconds.values())) or 1.0
            return {**{n: 1e-3 * s / scale for n, s in self.seconds.items()}, PEAK: 1.0}
        names = {*self.seconds, *self.variance}
        timings: dict[_Name, float] = {
            n: 1e3 * (self.seconds.get(n, 0.0) + price * self.variance.get(n, 0.0)) for n in names
        }
        return {**timings, PEAK: 1e-6}


def score(problem: Problem, choices: Mapping[Key, int | str], gap: float = 0.0) -> Solution:
    """What a set of choices costs in a problem."""
    own = [candidate for candidate in problem.candidates if candidate.key in choices]
    repeated = {s.product for s in own if s.product and choices[s.key] == REBUILD}
    seconds = sum(problem.seconds[s.key, choices[s.key]] for s in own)
    seconds += sum(problem.matmul_s[p] for p in repeated if p)
    variance = sum(problem.variance[s.key, choices[s.key]] for s in own)
    feeding = {s.source for s in own if s.source and choices[s.key] == REBUILD}
    variance += sum(
        problem.coupled.get((k, choices[k]), 0.0) for k in feeding if k is not None and k in choices
    )
    for block in problem.blocks:
        option = block.options.get(str(choices.get(block.key, STASHES)))
        if option is not None:
            seconds, variance = seconds + option.seconds, variance + option.variance
    if problem.host_link is not None:
        offloaded = problem.offloaded()
        seconds += problem.host_link.waits(
            sum(offloaded.get(chosen, 0.0) for chosen in choices.items())
        )
    names = dict.fromkeys(choices.items(), 1.0)
    peak = max(
        fixed + sum(size for name, size in row.items() if name in names)
        for fixed, row in _moments(problem)
    )
    return Solution(dict(choices), peak, seconds, variance, gap)


def _links(
    problem: Problem, coupled: Mapping[tuple[Key, int | str], float]
) -> list[tuple[Key, int | str, str]]:
    """(source, its choice, the product rebuilt from it), one for each whose variance is coupled."""
    found = {
        (s.source, s.product) for s in problem.candidates if s.product and s.source is not None
    }
    return [
        (key, choice, product)
        for key, choice in coupled
        for source, product in sorted(found)
        if source == key
    ]


def _moments(problem: Problem) -> list[tuple[float, dict[tuple[Key, int | str], float]]]:
    """(fixed bytes, bytes by candidate or block and choice) of the moments, the highest for each set of
    stashes that stand."""
    highest: dict[tuple[int, str | None, str | None], float] = {}
    for moment in problem.moments:
        where = (moment.stored, moment.block, moment.mode)
        highest[where] = max(moment.fixed, highest.get(where, -math.inf))
    candidates = {candidate.key: candidate for candidate in problem.candidates}
    blocks = {block.name: block for block in problem.blocks}
    found = []
    for (stored, name, mode), fixed in highest.items():
        row: dict[tuple[Key, int | str], float] = {}
        begin = under_way(problem.order, stored)
        for place, (key, share) in enumerate(problem.order[:stored]):
            if key[1] == BLOCK:
                if key[2] == "begin" and key[0] in blocks:
                    block = blocks[key[0]]
                    row |= {(block.key, m): float(w.saved_bytes) for m, w in block.options.items()}
                continue
            for choice in candidates[key].choices():
                there = candidates[key].bytes(choice)
                if place >= begin:
                    there += candidates[key].offloaded_bytes(choice)
                size = share * there
                if size:
                    row[key, choice] = row.get((key, choice), 0.0) + size
        if name in blocks and mode is not None:
            # Counts in that mode alone.
            own = (blocks[name].key, mode)
            row[own] = row.get(own, 0.0) + fixed
            fixed = 0.0
        found.append((fixed, row))
    return found
