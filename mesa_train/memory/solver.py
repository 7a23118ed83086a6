"""The choice for every site at once: an integer program, solved by HiGHS to a proven gap.

Minimise time + price * error variance (or the peak, or time alone) such that at every moment of the
step the live bytes fit, the added time and the added variance stay within their bounds, and a site
is rebuilt only where the matmul that makes it is repeated. ImportError, naming the extra, without
scipy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from mesa_train.memory.sites import REBUILD, Key, Site

# Objectives.
COST, PEAK = "cost", "peak"


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is chosen from, and what it costs.

    seconds, variance: by site and choice; the variance is of the gradient, relative to its square.
    matmul_s: seconds of repeating a product. coupled: variance that a choice of a source adds if
    something is rebuilt from it. moments: (bytes live beyond the sites' own, how many stored
    stashes stand) at the moments that matter. order: the sites of those stashes, each with its
    share of the site's bytes.
    """

    sites: Sequence[Site]
    seconds: Mapping[tuple[Key, int | str], float]
    variance: Mapping[tuple[Key, int | str], float]
    matmul_s: Mapping[str, float]
    coupled: Mapping[tuple[Key, int | str], float]
    moments: Sequence[tuple[float, int]]
    order: Sequence[tuple[Key, float]]


@dataclasses.dataclass(frozen=True)
class Solution:
    """choices: by site. peak_bytes: of the moments as given. seconds, variance: of the choices.
    gap: how far from the optimum it may be, relative to it."""

    choices: dict[Key, int | str]
    peak_bytes: float
    seconds: float
    variance: float
    gap: float


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

    columns: dict[object, int] = {}
    for site in problem.sites:
        for choice in site.choices():
            columns[site.key, choice] = len(columns)
    products = list(dict.fromkeys(s.product for s in problem.sites if s.product))
    for product in products:
        columns[product] = len(columns)
    coupled = {k: v for k, v in problem.coupled.items() if v > 0}
    links = _links(problem, coupled)
    for link in links:
        columns[link] = len(columns)
    columns[PEAK] = len(columns)
    count = len(columns)

    entries: list[tuple[int, int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def add(row: Mapping[object, float], least: float, most: float) -> None:
        entries.extend((len(low), columns[name], value) for name, value in row.items())
        low.append(least)
        high.append(most)

    for site in problem.sites:
        add({(site.key, c): 1.0 for c in site.choices()}, 1, 1)
        if site.product:
            add({(site.key, REBUILD): 1.0, site.product: -1.0}, -math.inf, 0)
    for key, choice, product in links:
        # The variance comes with the choice and the repetition together.
        add({(key, choice): 1.0, product: 1.0, (key, choice, product): -1.0}, -math.inf, 1)
    # Bytes in units of a MiB, so that the rows are of one magnitude.
    unit = 2.0**20
    for fixed, row in _moments(problem):
        scaled = {name: size / unit for name, size in row.items()}
        add({**scaled, PEAK: -1.0}, -math.inf, -fixed / unit)
    seconds: dict[object, float] = dict(problem.seconds)
    seconds |= {p: problem.matmul_s[p] for p in products}
    variance: dict[object, float] = {k: v for k, v in problem.variance.items() if k in columns}
    variance |= {(k, c, p): coupled[k, c] for k, c, p in links}
    if max_seconds is not None:
        add(seconds, -math.inf, max_seconds)
    if max_variance is not None:
        # Scaled up: the solver's tolerances are absolute.
        add({k: v * 1e3 for k, v in variance.items()}, -math.inf, max_variance * 1e3)

    goal = np.zeros(count)
    whole = np.ones(count)
    upper = np.ones(count)
    whole[columns[PEAK]] = 0
    upper[columns[PEAK]] = math.inf if budget is None else budget / unit
    scale = sum(problem.matmul_s[p] for p in products) + sum(map(abs, seconds.values())) or 1.0
    if objective == PEAK:
        goal[columns[PEAK]] = 1
        # Of equal peaks the cheapest.
        for name, value in seconds.items():
            goal[columns[name]] += 1e-3 * value / scale
    else:
        for name, value in seconds.items():
            goal[columns[name]] += value
        for name, value in variance.items():
            goal[columns[name]] += price * value
        goal[:-1] *= 1e3
        # Of equal costs the smallest.
        goal[columns[PEAK]] = 1e-6
    rows, cols, values = zip(*entries, strict=True)
    matrix = coo_array((values, (rows, cols)), shape=(len(low), count)).tocsr()
    if budget is not None and budget < 0:
        return None
    found = milp(
        goal,
        constraints=LinearConstraint(matrix, low, high),
        bounds=Bounds(np.zeros(count), upper),
        integrality=whole,
        options={"time_limit": limit_s, "mip_rel_gap": 1e-3},
    )
    if found.x is None:
        return None
    chosen: dict[Key, int | str] = {}
    for site in problem.sites:
        chosen[site.key] = max(site.choices(), key=lambda c: found.x[columns[site.key, c]])
    return score(problem, chosen, float(found.mip_gap or 0.0))


def score(problem: Problem, choices: Mapping[Key, int | str], gap: float = 0.0) -> Solution:
    """What a set of choices costs in a problem."""
    repeated = {s.product for s in problem.sites if s.product and choices[s.key] == REBUILD}
    seconds = sum(problem.seconds[k, c] for k, c in choices.items())
    seconds += sum(problem.matmul_s[p] for p in repeated if p)
    variance = sum(problem.variance[k, c] for k, c in choices.items())
    feeding = {s.source for s in problem.sites if s.source and choices[s.key] == REBUILD}
    variance += sum(problem.coupled.get((k, choices[k]), 0.0) for k in feeding if k)
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
    found = {(s.source, s.product) for s in problem.sites if s.product and s.source is not None}
    return [
        (key, choice, product)
        for key, choice in coupled
        for source, product in sorted(found)
        if source == key
    ]


def _moments(problem: Problem) -> list[tuple[float, dict[tuple[Key, int | str], float]]]:
    """(fixed bytes, bytes by site and choice) of the moments, the highest for each set of stashes
    that stand."""
    highest: dict[int, float] = {}
    for fixed, stored in problem.moments:
        highest[stored] = max(fixed, highest.get(stored, -math.inf))
    sites = {site.key: site for site in problem.sites}
    found = []
    for stored, fixed in sorted(highest.items()):
        row: dict[tuple[Key, int | str], float] = {}
        for key, share in problem.order[:stored]:
            for choice in sites[key].choices():
                size = share * sites[key].bytes(choice)
                if size:
                    row[key, choice] = row.get((key, choice), 0.0) + size
        found.append((fixed, row))
    return found
