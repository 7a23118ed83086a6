"""The planner's program: its answers against every choice there is."""

import dataclasses
import itertools

import pytest

from mesa_train.measure.profiling import candidates as candidates_module
from mesa_train.measure.profiling.blocks import STASHES, Block, BlockOption
from mesa_train.measure.profiling.candidates import (
    KEEP,
    OFFLOAD,
    OFFLOAD8,
    OFFLOADED_AS,
    REBUILD,
    Candidate,
    add_offloaded_choices,
    as_policy,
)
from mesa_train.measure.stash_log import BLOCK
from mesa_train.planner.problem import HostLink, Moment, Problem, score
from mesa_train.planner.solver import PEAK, solve
from mesa_train.policy import Policy

pytest.importorskip("highspy")


@pytest.fixture(autouse=True, scope="module")
def few_widths():
    """Three widths: the tests visit every combination."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates_module, "GROUP", {8: 128, 4: 64, 2: 32})
        yield


KINDS = (("layer_norm", "normalized"), ("attention", "q"), ("attention", "k"))


def problem(moments=((1e6, 6), (2e6, 3))):
    """Two blocks of three candidates; q and k are rebuilt from the norm's output by one Linear."""
    candidates = []
    for block in range(2):
        for kind in KINDS:
            product = f"{block}.qkv" if kind[0] == "attention" else None
            source = (f"{block}", *KINDS[0]) if product else None
            candidates.append(
                Candidate(
                    (f"{block}", *kind), len(candidates), [(1000, 256)], 1_024_000, product, source
                )
            )
    seconds = {
        (s.key, c): {8: 3.0, 4: 4.0, 2: 5.0}.get(c, 0.0) for s in candidates for c in s.choices()
    }
    variance = {
        (s.key, c): {8: 1e-6, 4: 3e-4, 2: 7e-3}.get(c, 0.0) * (1 + s.order)
        for s in candidates
        for c in s.choices()
    }
    coupled = {(s.key, c): 5 * variance[s.key, c] for s in candidates[::3] for c in (8, 4, 2)}
    order = [(s.key, 1.0) for s in candidates]
    moments = [Moment(*moment) for moment in moments]
    return Problem(
        candidates, seconds, variance, {"0.qkv": 2.5, "1.qkv": 9.0}, coupled, moments, order
    )


def cheapest(scores, budget, error_weight):
    """The least cost of those that fit, None if there is none."""
    return min((s.cost(error_weight) for s in scores if s.peak_bytes <= budget), default=None)


@pytest.fixture(scope="module")
def every():
    """What every combination of the small program timings."""
    small_problem = problem()
    keys = [s.key for s in small_problem.candidates]
    return [
        score(small_problem, dict(zip(keys, choices, strict=True)))
        for choices in itertools.product(*[s.choices() for s in small_problem.candidates])
    ]


def test_solver_prints_nothing(capfd):
    """Stdout is for results. HiGHS prints its banner once a process, so this test comes first."""
    assert solve(problem()) is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("budget", [2.2e6, 2.6e6, 3.4e6, 5e6, 1e7])
def test_solver_against_all_there_is(every, budget):
    error_weight = 2000.0
    best = cheapest(every, budget, error_weight)
    solution = solve(problem(), budget=budget, error_weight=error_weight)
    if best is None:
        assert solution is None
        return
    assert solution.peak_bytes <= budget * (1 + 1e-6)
    assert solution.cost(error_weight) == pytest.approx(best, rel=2e-3)


def test_solver_with_blocks_against_all_there_is():
    """The stashes of a block are chosen one by one, or all at once with it."""
    blocks_problem = problem()
    options = {
        "PyTorch": BlockOption(2_000_000, 0.0, 0.0),
        "checkpoint": BlockOption(300_000, 6.0, 1e-4),
    }
    blocks = [Block(name, options) for name in ("0", "1")]
    candidates = [
        dataclasses.replace(candidate, block=candidate.key[0])
        for candidate in blocks_problem.candidates
    ]
    order = []
    for name in ("0", "1"):
        order += [
            ((name, BLOCK, "begin"), 0.0),
            *[e for e in blocks_problem.order if e[0][0] == name],
        ]
    # A checkpointed block works in more memory when its turn comes, one left to PyTorch in less.
    moments = [Moment(1e5, 8)]
    for start, name in ((0, "0"), (4, "1")):
        moments.append(Moment(2e5, start + 4, name, STASHES))
        moments.append(Moment(1.5e6, start, name, "checkpoint"))
        moments.append(Moment(2.1e6, start, name, "PyTorch"))
    blocks_problem = dataclasses.replace(
        blocks_problem, candidates=candidates, order=order, moments=moments, blocks=blocks
    )
    every = []
    for labels in itertools.product([STASHES, *options], repeat=2):
        strategies = dict(zip([block.key for block in blocks], labels, strict=True))
        one_by_one = [s for s in candidates if strategies[s.block, BLOCK, ""] == STASHES]
        for picked in itertools.product(*[s.choices() for s in one_by_one]):
            every.append(
                score(
                    blocks_problem,
                    dict(zip([s.key for s in one_by_one], picked, strict=True)) | strategies,
                )
            )
    for budget, error_weight in ((1.2e6, 0.0), (1.8e6, 2000.0), (2.5e6, 2000.0), (4e6, 0.0)):
        best = cheapest(every, budget, error_weight)
        solution = solve(blocks_problem, budget=budget, error_weight=error_weight)
        if best is None:
            assert solution is None
            continue
        assert solution.peak_bytes <= budget * (1 + 1e-6)
        assert solution.cost(error_weight) == pytest.approx(best, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("budget", [0.7e6, 1.2e6, 3e6])
@pytest.mark.parametrize("capacity", [None, 3e5, 0])
def test_solver_with_a_bus_against_all_there_is(budget, capacity):
    """What is offloaded timings what the arithmetic does not hide, and fits CPU memory."""
    offload_problem = problem(((1e5, 3), (6e5, 1)))
    candidates = [
        dataclasses.replace(candidate, offloadable=True)
        for candidate in offload_problem.candidates[:3]
    ]
    seconds, variance = dict(offload_problem.seconds), dict(offload_problem.variance)
    add_offloaded_choices(seconds, candidates)
    add_offloaded_choices(variance, candidates)
    # 8-bit codes take 0.26 s a candidate, whole tensors 1.02 s.
    host_link = HostLink(1e6, 0.3, 0.6, capacity)
    offload_problem = dataclasses.replace(
        offload_problem,
        candidates=candidates,
        seconds=seconds,
        variance=variance,
        order=offload_problem.order[:3],
        host_link=host_link,
    )
    error_weight, best = 2000.0, None
    for choices in itertools.product(*[s.choices() for s in candidates]):
        by_key = dict(zip([s.key for s in candidates], choices, strict=True))
        solution = score(offload_problem, by_key)
        offloaded = sum(s.offloaded_bytes(by_key[s.key]) for s in candidates)
        if solution.peak_bytes <= budget and (capacity is None or offloaded <= capacity):
            best = min(solution.cost(error_weight), best or solution.cost(error_weight))
    solution = solve(offload_problem, budget=budget, error_weight=error_weight)
    if best is None:
        assert solution is None
        return
    assert solution.peak_bytes <= budget * (1 + 1e-6)
    assert solution.cost(error_weight) == pytest.approx(best, rel=2e-3)


def test_the_bus_is_waited_for_beyond_the_arithmetic():
    host_link = HostLink(1e9, 0.5, 1.0)
    waits = [host_link.waits(size) for size in (4e8, 8e8, 2e9)]
    assert waits == pytest.approx([0.0, 0.3, 1.5 + 1.0])


def test_solver_finds_the_smallest_peak(every):
    smallest = min(solution.peak_bytes for solution in every)
    assert solve(problem(), objective=PEAK).peak_bytes == pytest.approx(smallest)


def test_solver_keeps_its_bounds():
    small_problem = problem()
    free = solve(small_problem, budget=3e6)
    slow = solve(small_problem, objective=PEAK, max_seconds=free.seconds / 2)
    assert slow.seconds <= free.seconds / 2 + 1e-9
    exact = solve(small_problem, objective=PEAK, max_variance=1e-5)
    assert exact.variance <= 1e-5 * (1 + 1e-3)
    assert solve(small_problem, budget=3e5) is None


@pytest.mark.parametrize("quantity", ["seconds", "variance"])
@pytest.mark.parametrize("unit", [1e-7, 1e-4, 1.0])
def test_solver_keeps_tiny_bounds(every, quantity, unit):
    """HiGHS has absolute tolerances; the bounds of a small model are of their magnitude."""
    full = problem()
    scaled = dataclasses.replace(
        full,
        seconds={name: unit * value for name, value in full.seconds.items()},
        matmul_s={name: unit * value for name, value in full.matmul_s.items()},
        variance={name: unit * value for name, value in full.variance.items()},
        coupled={name: unit * value for name, value in full.coupled.items()},
    )
    values = sorted({getattr(solution, quantity) for solution in every})
    for value in values[1 :: len(values) // 20]:
        bound = value - min(max(2e-7 / unit, 1e-6 * value), 1e-3 * value)
        limit = {f"max_{quantity}": unit * bound}
        smallest = solve(scaled, objective=PEAK, **limit)
        best = solve(scaled, budget=1.5e6, error_weight=1.0, **limit)
        within = [s.peak_bytes for s in every if getattr(s, quantity) <= bound]
        assert smallest.peak_bytes == pytest.approx(min(within), rel=2e-3)
        for solution in filter(None, (smallest, best)):
            assert getattr(solution, quantity) <= unit * bound


def test_solver_without_anything_to_choose():
    empty = Problem([], {}, {}, {}, {}, [Moment(5e6, 0)], [])
    assert solve(empty, budget=6e6).gap == 0
    assert solve(empty, budget=4e6) is None


def test_policy_of_choices():
    """Common choices become one override, others their own; inner modules come after outer ones."""
    base = Policy()
    keys = [("a", *KINDS[1]), ("b", *KINDS[1]), ("b.c", *KINDS[1]), ("a", *KINDS[0])]
    candidates = [Candidate(key, i, [(8, 8)], 256) for i, key in enumerate(keys)]
    candidates[0].source, candidates[0].product = keys[3], "qkv"
    policy = as_policy(base, candidates, dict(zip(keys, [REBUILD, 4, 8, 4], strict=True)))
    rules = policy.rules(["", "a", "b", "b.c"])
    assert rules["a"]["attention", "q"].rebuild_linear
    assert rules["b"]["attention", "q"].codec.bits == 4
    assert rules["b.c"]["attention", "q"].codec.bits == 8
    # Something is rebuilt from it, and rounds to nearest for that.
    assert not rules["a"]["layer_norm", "normalized"].codec.stochastic
    # What the commonest choice changes, the others change back.
    mixed = as_policy(
        base, candidates[:3], dict(zip(keys, [OFFLOAD8, OFFLOAD8, OFFLOAD], strict=False))
    )
    offloaded = [mixed.rules(["", "a", "b", "b.c"])[n]["attention", "q"] for n in ("a", "b", "b.c")]
    assert [rule.offload for rule in offloaded] == [True] * 3
    assert str(offloaded[2].codec) == "lossless"
    for common, other in ((OFFLOAD8, 8), (REBUILD, 8), (REBUILD, OFFLOAD)):
        policy = as_policy(
            base, candidates[:3], dict(zip(keys, [common, other, common], strict=False))
        )
        rule = policy.rules(["", "a", "b", "b.c"])["b"]["attention", "q"]
        assert rule.offload == (other in OFFLOADED_AS)
        assert not rule.rebuild_linear
    saved = as_policy(base, candidates, dict.fromkeys(keys, KEEP))
    assert len(saved.overrides) == 3  # b.c is inside b: said again
    assert all(change == {"bits": 32} for change in saved.overrides.values())
