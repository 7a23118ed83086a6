"""Memory before anything is started: the parts are those of the model, and the sums are right."""

import pytest

from mesa_train.training.estimates import CODED, GIB, MACHINES, SCHEMES, Sizes, estimate, fits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sizes():
    return Sizes("vit_22b")


def test_model_states(sizes):
    states = {k: estimate(sizes, s, 1, "mesa8", 0).states / GIB for k, s in SCHEMES.items()}
    expected = {"fsdp2": 330.9, "fp32+adam8": 207.5, "bf16+adam8": 124.7, "zero3-cpu": 41.4}
    expected |= {"lion8": 41.37 + 21.33, "factored": 41.4, "zero3-offload": 0.0}
    for key, value in expected.items():
        assert states[key] == pytest.approx(value, abs=0.06), key
    assert estimate(sizes, SCHEMES["fsdp2"], 8, "mesa8", 0).states == int(sizes.parameters * 2)


def test_kept_for_an_image(sizes):
    blocks = 48 * 256
    head = sizes.kept("mesa8") - blocks * 57_412
    # The pooling head's keys, values and x_hat: three tensors a token, and little for one token.
    assert 256 * 3 * 6144 < head < 256 * 3.4 * 6144 + 2**20
    assert 0 < sizes.kept("mesa8-recompute") - blocks * 13_060 < 256 * 3.4 * 6144 + 2**20
    assert sizes.kept("plain") > 3.4 * sizes.kept("mesa8")
    # Block inputs in 8 bits (1.03 bytes an element) and one block's stashes.
    inputs = blocks * 6144 * 1.03125
    one = sizes.kept("mesa8") / 48
    assert inputs < sizes.kept(CODED) - one < inputs + 256 * 3.4 * 6144 + 2**20


def test_what_fits(sizes):
    def images(machine, scheme, policy):
        return sizes.largest_batch(SCHEMES[scheme], machine, policy)

    assert images("1x24", "nf4", "mesa8") > 8
    assert images("1x24", "nf4", "mesa8-recompute") == images("1x24", "nf4", "mesa8")
    assert 80 < images("1x80", "lion8", CODED) < 110
    assert images("1x80", "bf16+adam8", "mesa8") == 0
    assert images("8x24", "fsdp2", "mesa8") == 0
    assert images("8x80", "fsdp2", "mesa8") > 3 * images("8x80", "fsdp2", "plain") > 30
    found = fits(sizes, ("mesa8",))
    assert {row["machine"] for row in found} == set(MACHINES)
    assert all(
        row["images"]["mesa8"] == images(row["machine"], key, "mesa8")
        for row in found
        for key in SCHEMES
        if SCHEMES[key].name == row["scheme"]
    )
    with pytest.raises(ValueError, match="policy must be one of plain, checkpoint, coded"):
        estimate(sizes, SCHEMES["nf4"], 1, "mesa7", 1)


@pytest.mark.parametrize(("name", "machine"), [("vit_22b_3b", "1x24"), ("vit_22b_11b", "1x80")])
def test_siblings_fill_a_card(name, machine):
    sizes = Sizes(name)
    capacity = MACHINES[machine][1] * GIB
    states = estimate(sizes, SCHEMES["bf16+adam8"], 1, "mesa8", 0).states
    assert 0.6 * capacity < states < 0.85 * capacity
    assert sizes.largest_batch(SCHEMES["bf16+adam8"], machine, "mesa8") >= 8
