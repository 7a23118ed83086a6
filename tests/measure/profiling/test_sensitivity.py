"""How the variance of codes goes with their bits: the theory, and what codes of noise show."""

from pathlib import Path

import pytest
import torch

from mesa_train.codecs.affine import Affine
from mesa_train.measure.profiling.candidates import KEEP, REBUILD, Candidate
from mesa_train.measure.profiling.sensitivity import calibrate, typical
from mesa_train.policy import PRESETS, Policy
from mesa_train.utils import records

# A grid of 2**bits - 1 steps over the range has an error of step**2 / 12, so variances go with the
# squared number of steps: 255 at 8 bits, 15 at 4, 3 at 2.
STEPS = {8: 255, 5: 31, 4: 15, 2: 3}


def variance(bits):
    """Mean squared error of the codes of uniform noise, groups so long that each spans it."""
    x = torch.rand(64, 1024, generator=torch.Generator().manual_seed(0))
    codec = Affine(bits, group_size=1024)
    return (codec.decode(codec.encode(x), 1024, torch.float32) - x).square().mean().item()


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_variance_of_the_codes_of_noise(bits):
    # A scale is rounded up to bfloat16, by at most 2**-7: its square is at most 1.6 % more.
    assert variance(bits) == pytest.approx(1 / (12 * STEPS[bits] ** 2), rel=0.03)


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("kind", ["variance", "coupled"])
def test_the_planner_extrapolates_as_the_codes_do(bits, kind):
    source = Candidate(("0", "layer_norm", "normalized"), 0, [(8, 64)], 2048)
    rebuilt = Candidate(("0", "attention", "q"), 1, [(8, 64)], 2048, "0.qkv", source.key)
    table = getattr(typical([source, rebuilt]), kind)
    ratio = table[source.key, bits] / table[source.key, 4]
    assert ratio == pytest.approx((STEPS[4] / STEPS[bits]) ** 2)
    assert ratio == pytest.approx(variance(bits) / variance(4), rel=0.05)


def test_typical_values_are_those_of_the_committed_rows():
    """A trained model, one operand at 4 bits. Machines differ by a few percent."""
    rows = records.read(Path(__file__).resolve().parents[3] / "docs/results/presets.jsonl")
    for operands, kinds in {
        "x_hat, last norm": [("layer_norm", "normalized")],
        "activation": [("activation", "input")],
        "q, k": [("attention", "q"), ("attention", "k")],
        "v": [("attention", "v")],
        "out": [("attention", "out")],
        "conv": [("conv", "input")],
    }.items():
        names = [operands] if operands == "q, k" else operands.split(", ")
        measured = [
            row["gradient_error"] ** 2
            for row in rows
            if row["model"] == "small_vit after 200 steps"
            and (row["kind"], row.get("recompute")) == ("operand", "cheap")
            and row["operand"] in names
            and (row["bits"], row["group_size"]) == (4, 128)
        ]
        assert len(measured) == len(names)
        candidates = [Candidate(("0", *kind), 0, [(8, 64)], 2048) for kind in kinds]
        variance = typical(candidates).variance
        assert sum(variance[c.key, 4] for c in candidates) == pytest.approx(sum(measured), rel=0.15)


# --- calibration, on gradients that are made up ---

NAMES = ["0.weight", "1.weight", "head.weight"]
FIRST, SECOND = ("0", "linear", "input"), ("1", "linear", "input")
Q, LAST = ("0", "attention", "q"), ("head", "layer_norm", "normalized")
MODEL = [
    Candidate(FIRST, 0, [(8, 64)], 2048, block="0"),
    Candidate(Q, 1, [(8, 64)], 2048, "0.qkv", FIRST, "0"),
    Candidate(SECOND, 2, [(8, 128)], 4096, block="1"),
    Candidate(LAST, 3, [(8, 64)], 2048),
]
# What a candidate's codes of 4 bits move the gradient of the weight beside it by; in others as the grid is.
MOVES = {FIRST: 0.3, Q: 0.1, SECOND: 0.4, LAST: 0.2}
OF = {FIRST: 0, Q: 0, SECOND: 1, LAST: 2}


def made_up(policies):
    """A function from a policy to gradients of length 1 each, whose squared errors add up; what is asked
    for is appended to `policies`."""

    def gradients(policy):
        policies.append(policy)
        exact = torch.zeros(3, 8)
        exact[:, 0] = 1.0
        if policy is None:  # float32, from which keeping everything is 0.01 off
            exact[0, 7] = 0.01 * 3**0.5
            return list(exact)
        rules = policy.rules(["0", "1", "head"])
        for place, (key, move) in enumerate(MOVES.items(), 1):
            rule = rules[key[0]][key[1:]]
            if key == Q and rule.rebuild_linear:
                bits = rules["0"][FIRST[1:]].codec
                exact[0, 6] = 0.5 * STEPS[4] / STEPS[bits.bits] if str(bits) != "lossless" else 0.0
            elif str(rule.codec) != "lossless":
                exact[OF[key], place] = move * STEPS[4] / STEPS[rule.codec.bits]
        return list(exact)

    return gradients


def test_calibration_finds_what_was_made_up():
    policies, passes = [], []
    sensitivity = calibrate(MODEL, PRESETS["mesa8"], made_up(policies), NAMES, passes.append)
    # float32 and all kept; 4 and 2 bits of q, of the Linears' inputs with and without q rebuilt from
    # them, and of the head's, which stands in no block.
    assert sensitivity.passes == len(policies) == 2 + 2 + 4 + 2
    assert len(passes) == sensitivity.passes
    assert sensitivity.floor == pytest.approx(0.01**2, rel=1e-3)
    # Squares relative to the whole gradient's, which is 3. A thousandth is shared out evenly.
    assert sensitivity.variance[Q, 4] == pytest.approx(0.1**2 / 3)
    assert sensitivity.variance[Q, 2] == pytest.approx(25 * 0.1**2 / 3)
    assert sensitivity.variance[LAST, 4] == pytest.approx(0.2**2 / 3)
    assert sensitivity.variance[Q, KEEP] == sensitivity.variance[Q, REBUILD] == 0
    both = sensitivity.variance[FIRST, 4] + sensitivity.variance[SECOND, 4]
    assert both == pytest.approx((0.3**2 + 0.4**2) / 3)
    # By the squared error around each and by its elements, of which the second has twice as many.
    base = 1e-3 * (0.3**2 + 0.4**2)
    ratio = 2 * (0.4**2 + base) / (0.3**2 + base)
    assert sensitivity.variance[SECOND, 4] / sensitivity.variance[FIRST, 4] == pytest.approx(ratio)
    for key in (FIRST, Q, SECOND, LAST):
        assert sensitivity.variance[key, 8] == pytest.approx(sensitivity.variance[key, 4] / 17**2)
    assert {key for key, _ in sensitivity.coupled} == {FIRST}
    assert sensitivity.coupled[FIRST, 8] == pytest.approx(sensitivity.coupled[FIRST, 4] / 17**2)
    # The first's share of the pass in which q is rebuilt, less its share of the one without.
    more = 0.3**2 + 0.4**2 + 0.5**2
    around, other = 0.3**2 + 0.5**2 + 1e-3 * more, 2 * (0.4**2 + 1e-3 * more)
    share = more / 3 * around / (around + other)
    assert sensitivity.coupled[FIRST, 4] == pytest.approx(share - sensitivity.variance[FIRST, 4])


def test_a_gradient_that_is_not_finite_rules_a_choice_out():
    def gradients(policy):
        coded = policy is not None and "2" in str(policy.rules(["0"])["0"]["linear", "input"].codec)
        return [torch.full((4,), float("nan") if coded else 1.0)]

    result = calibrate(
        [Candidate(FIRST, 0, [(8, 64)], 2048)], PRESETS["mesa8"], gradients, ["0.weight"]
    )
    assert result.variance[FIRST, 2] == float("inf")
    assert result.variance[FIRST, 4] == 0


def test_inputs_of_checkpoints_are_measured_against_the_tensors_themselves():
    one = Candidate(("0", "checkpoint", "input"), 0, [(8, 64)], 2048, block="0")
    moves = {None: 0.5, 8: 0.51, 4: 0.7}
    policies = {bits: Policy(checkpoint_inputs=bits) for bits in moves}

    def gradients(policy):
        bits = policy.checkpoint_inputs if policy in policies.values() else None
        return [torch.tensor([1.0, moves[bits]])]

    candidate = Candidate(FIRST, 0, [(8, 64)], 2048)
    result = calibrate(
        [candidate],
        PRESETS["lossless"],
        gradients,
        ["0.weight"],
        inputs=[one],
        checkpointing=policies,
    )
    norm = 1.0 + 0.5**2
    assert result.variance[one.key, 8] == pytest.approx(0.01**2 / norm, rel=1e-4)
    assert result.variance[one.key, 4] == pytest.approx(0.2**2 / norm, rel=1e-4)
    assert result.passes == 2 + 2 + 3
