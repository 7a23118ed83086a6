"""What the planner chooses from, by hand: bytes of a candidate's choices, what a block's mode becomes in a policy,
and what choices cost together."""

import dataclasses
from types import SimpleNamespace

import pytest
from torch import nn

from mesa_train.measure.profiling.blocks import (
    STASHES,
    STRATEGIES,
    Block,
    BlockOption,
    block_of,
    with_blocks,
)
from mesa_train.measure.profiling.candidates import (
    KEEP,
    OFFLOAD,
    OFFLOAD8,
    REBUILD,
    Candidate,
    add_offloaded_choices,
    first_in_flight,
)
from mesa_train.measure.profiling.profile import blocks_of
from mesa_train.measure.profiling.times import CHECKPOINT, CHECKPOINT_CODES
from mesa_train.measure.stash_log import BLOCK, StashLog
from mesa_train.planner.problem import HostLink, Moment, Problem, score
from mesa_train.policy import Policy
from mesa_train.stash.offload import WINDOW

ROWS, COLS = 1000, 256
NORM, Q = ("0", "layer_norm", "normalized"), ("0", "attention", "q")
# Codes, and four bytes for each group of 128, 64 or 32 elements.
BYTES = {
    8: ROWS * (256 + 4 * 2), 6: ROWS * (192 + 4 * 2), 5: ROWS * (160 + 4 * 4),
    4: ROWS * (128 + 4 * 4), 3: ROWS * (96 + 4 * 8), 2: ROWS * (64 + 4 * 8),
}  # fmt: skip
WHOLE = 4 * ROWS * COLS


def candidate(key=NORM, order=0, **fields):
    return Candidate(key, order, [(ROWS, COLS)], WHOLE, **fields)


def test_bytes_of_a_sites_choices():
    one = candidate(product="qkv", offloadable=True)
    assert one.choices() == [8, 6, 5, 4, 3, 2, KEEP, OFFLOAD8, OFFLOAD, REBUILD]
    assert {c: one.bytes(c) for c in one.choices()} == {
        **BYTES, KEEP: WHOLE, OFFLOAD8: 0, OFFLOAD: 0, REBUILD: 0,
    }  # fmt: skip
    offloaded = {c: one.offloaded_bytes(c) for c in one.choices()}
    assert offloaded == dict.fromkeys(one.choices(), 0) | {OFFLOAD8: BYTES[8], OFFLOAD: WHOLE}
    assert one.elements == ROWS * COLS
    twice = Candidate(NORM, 0, [(ROWS, COLS), (2 * ROWS, COLS)])
    assert twice.bytes(4) == 3 * BYTES[4]
    assert candidate().choices() == [8, 6, 5, 4, 3, 2, KEEP]
    for at_least_8 in (("0", "fallback", "saved"), ("0", "loss", "input")):
        assert candidate(at_least_8).choices() == [8, KEEP]


def test_what_is_on_its_way_is_on_the_device():
    """The last WINDOW stashes; a block's begin and end are none."""
    order = [((str(n), "linear", "input"), 1.0) for n in range(WINDOW + 2)]
    assert first_in_flight(order, WINDOW + 2) == 2
    assert first_in_flight(order, WINDOW + 1) == 1
    assert first_in_flight(order, WINDOW) == 0
    assert first_in_flight(order, 1) == 0
    assert first_in_flight(order, 0) == 0
    begun = [*order[:2], (("b", BLOCK, "begin"), 0.0), *order[2:]]
    assert first_in_flight(begun, WINDOW + 3) == 3
    assert first_in_flight(begun, WINDOW + 2) == 1


def test_what_is_moved_costs_as_much():
    table = {(NORM, 8): 1.0, (NORM, KEEP): 2.0, (Q, 8): 3.0}
    add_offloaded_choices(table, [candidate(offloadable=True), candidate(Q)])
    assert table == {
        (NORM, 8): 1.0, (NORM, KEEP): 2.0, (Q, 8): 3.0, (NORM, OFFLOAD8): 1.0, (NORM, OFFLOAD): 2.0,
    }  # fmt: skip


def test_the_block_of_a_module():
    blocks = ["blocks.1", "blocks.10"]
    assert block_of("blocks.1", blocks) == "blocks.1"
    assert block_of("blocks.1.mlp", blocks) == "blocks.1"
    assert block_of("blocks.10.mlp", blocks) == "blocks.10"
    assert block_of("blocks.2", blocks) is None
    assert block_of("head", blocks) is None


@pytest.mark.parametrize("mode", STRATEGIES)
def test_a_blocks_mode_in_a_policy(mode):
    checkpointed = mode.startswith("checkpoint")
    policy = with_blocks(Policy(bits=4, recompute="linear"), {"a.0": mode, "b": STASHES}, {})
    assert policy.checkpoint == (("a.0",) if checkpointed else ())
    rules = policy.rules(["a", "a.0", "a.0.fc", "b"])
    assert rules["b"]["linear", "input"] == rules["a"]["linear", "input"]
    inside = rules["a.0.fc"]["linear", "input"]
    assert inside.enabled == ("of codes" in mode)
    if inside.enabled:
        assert (inside.codec.bits, inside.group_size, inside.rebuild_linear) == (8, 128, False)
    rule = rules["a.0"]["checkpoint", "input"]
    bits = next((n for n in (8, 4) if f"input {n} bits" in mode), None)
    assert rule.enabled == (bits is not None)
    assert rule.offload == ("offloaded" in mode)
    if bits is not None:
        assert (rule.codec.bits, rule.group_size) == (bits, {8: 128, 4: 64}[bits])


def test_blocks_in_a_row_are_one_pattern():
    def patterns(modes, rows):
        return list(with_blocks(Policy(), modes, rows).checkpoint)

    strategy = "checkpoint"
    assert patterns({"a.0": strategy, "a.1": strategy}, {"a": 2}) == ["a.*"]
    # Not all that stand there, not of one mode, alone, or in the model itself.
    assert patterns({"a.0": strategy, "a.1": strategy}, {"a": 3}) == ["a.0", "a.1"]
    assert patterns({"a.0": strategy, "a.1": "PyTorch"}, {"a": 2}) == ["a.0"]
    assert patterns({"a.0": strategy}, {"a": 1}) == ["a.0"]
    assert patterns({"0": strategy, "1": strategy}, {"": 2}) == ["0", "1"]
    assert patterns({"a.0": strategy, "b.0": strategy, "a.1": strategy}, {"a": 2}) == ["a.*", "b.0"]


def test_costs_of_choices_by_hand():
    """Two candidates, of which one has two stashes, and a block; q is rebuilt from the norm."""
    norm, q = candidate(), candidate(Q, 1, product="qkv", source=NORM)
    seconds = {(NORM, 8): 1.0, (NORM, 4): 2.0, (Q, 8): 3.0, (Q, 4): 4.0, (Q, REBUILD): 0.5}
    variance = {name: 0.01 * value for name, value in seconds.items()}
    option = BlockOption(300_000, 7.0, 0.5, 2_000)
    problem = Problem(
        [norm, q],
        seconds,
        variance,
        {"qkv": 10.0},
        {(NORM, 8): 0.2, (NORM, 4): 0.3},
        # The higher of two at one place counts.
        [Moment(100, 4), Moment(900_000, 2), Moment(500, 2), Moment(50, 4, "1", "checkpoint")],
        [(NORM, 1.0), (Q, 0.5), (Q, 0.5), (("1", BLOCK, "begin"), 0.0)],
        [Block("1", {"checkpoint": option})],
    )
    stored = {NORM: 8, Q: 4, ("1", BLOCK, ""): STASHES}
    solution = score(problem, stored)
    assert (solution.seconds, solution.variance) == pytest.approx((5.0, 0.05))
    assert solution.peak_bytes == 900_000 + BYTES[8] + BYTES[4] / 2
    rebuilt = score(problem, stored | {Q: REBUILD})
    assert (rebuilt.seconds, rebuilt.variance) == pytest.approx((11.5, 0.015 + 0.2))
    assert rebuilt.peak_bytes == 900_000 + BYTES[8]
    checkpointed = score(problem, stored | {("1", BLOCK, ""): "checkpoint"})
    assert (checkpointed.seconds, checkpointed.variance) == pytest.approx((12.0, 0.55))
    # At the last moment its input is there, and its own 50 bytes.
    last = [Moment(100, 4), Moment(50, 4, "1", "checkpoint")]
    ended = dataclasses.replace(problem, moments=last)
    checkpointed = score(ended, stored | {("1", BLOCK, ""): "checkpoint"})
    assert checkpointed.peak_bytes == BYTES[8] + BYTES[4] + 300_000 + 100
    moving = dataclasses.replace(problem, host_link=HostLink(1000.0, 1.5, 0.5))
    waited = score(moving, stored | {("1", BLOCK, ""): "checkpoint"})
    # 2,000 bytes take 2 s each way, of which 1.5 and 0.5 s are hidden.
    assert waited.seconds == pytest.approx(12.0 + 0.5 + 1.5)
    assert waited.cost(2.0) == pytest.approx(14.0 + 2 * 0.55)
    assert waited.within(14.0, 0.55)
    assert not waited.within(13.9, None)
    assert not waited.within(None, 0.5)
    assert waited.within(None, None)


def test_a_watch_knows_the_module_of_each_weight():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    watch = StashLog()
    watch.installed(model)
    weight = model[0].weight
    assert watch.modules == {id(weight): (weight, "0")}


def test_what_a_block_takes_in_each_mode_by_hand():
    """The variance of a mode is that of 8-bit codes inside, if there are any, plus that of its input's codes."""
    one, block_input = candidate(block="b"), Candidate(("b", "checkpoint", "input"), 0)
    other = candidate(Q)
    modes = {name: STRATEGIES[name] for name in STRATEGIES if name.startswith("checkpoint")}
    sensitivity = SimpleNamespace(
        variance={
            (one.key, 8): 1.0,
            (Q, 8): 100.0,
            (block_input.key, 8): 0.25,
            (block_input.key, 4): 0.5,
        }
    )
    times = SimpleNamespace(blocks={("b", CHECKPOINT): 3.0, ("b", CHECKPOINT_CODES): 5.0})
    space = SimpleNamespace(
        simulator=SimpleNamespace(blocks=["b"]),
        candidates=[one, other],
        strategies={"PyTorch": STRATEGIES["PyTorch"], **modes},
        block_inputs={"b": block_input},
        order=SimpleNamespace(saved_by_block={("b", name): len(name) for name in STRATEGIES}),
        input_bytes=lambda block, bits: 10 * bits,
    )
    (block,) = blocks_of(space, times, sensitivity)
    assert block.name == "b"
    assert {name: option.saved_bytes for name, option in block.options.items()} == {
        n: len(n) for n in STRATEGIES
    }
    assert {name: option.seconds for name, option in block.options.items()} == {
        "PyTorch": 0.0, **{name: 5.0 if "codes" in name else 3.0 for name in modes},
    }  # fmt: skip
    assert {name: option.variance for name, option in block.options.items()} == {
        "PyTorch": 0.0,
        "checkpoint": 0.0,
        "checkpoint, input 8 bits": 0.25,
        "checkpoint, input 4 bits": 0.5,
        "checkpoint of codes": 1.0,
        "checkpoint of codes, input 8 bits": 1.25,
        "checkpoint of codes, input 4 bits": 1.5,
        "checkpoint, input 8 bits, offloaded": 0.25,
        "checkpoint of codes, input 8 bits, offloaded": 1.25,
    }
    offloaded = {name for name, option in block.options.items() if option.offloaded_bytes == 80}
    assert offloaded == {name for name in STRATEGIES if "offloaded" in name}
