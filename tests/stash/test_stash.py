"""What is kept, byte by byte, and that a lineage is used only while it is true."""

import pytest
import torch
import torch.nn.functional as F
from stash_helpers import COLS, ROWS, activation, codes, kept
from torch import nn

from mesa_train import Policy, compress
from mesa_train.stash import stash


@pytest.mark.parametrize("bits", [8, 5, 4, 3])
def test_linear_keeps_codes_of_its_input(bits):
    linear = nn.Linear(COLS, 32)
    policy = Policy(bits=bits, min_bytes=0)
    assert kept(linear, activation(ROWS, COLS), parameters=linear.parameters(), policy=policy)[
        0
    ] == codes(ROWS, COLS, bits)


def test_frozen_weight_keeps_no_input_and_frozen_input_no_weight():
    linear = nn.Linear(COLS, 32)
    linear.weight.requires_grad_(False)
    assert kept(linear, activation(ROWS, COLS), parameters=linear.parameters())[0] == 0
    computed = torch.randn(32, COLS).requires_grad_() * 2
    size, _ = kept(lambda x: F.linear(x, computed), torch.randn(ROWS, COLS))
    assert size == codes(ROWS, COLS)
    a, b = activation(ROWS, COLS), torch.randn(COLS, 32)
    assert kept(torch.mm, a, b)[0] == codes(COLS, 32)
    assert kept(torch.mm, torch.randn(ROWS, COLS), activation(COLS, 32))[0] == codes(ROWS, COLS)


def test_a_small_view_does_not_hold_its_storage():
    """It would: a diagonal that is too small to code is a view of the whole matrix."""

    def function(x, w):
        return F.linear(torch.diagonal(x.mul(1.0))[None], w)

    w = nn.Parameter(torch.randn(3, 128))
    x = torch.randn(128, 128).requires_grad_()
    for preset in ("mesa8", "lossless"):
        size, output = kept(function, x, w, parameters=(w,), policy=Policy.preset(preset))
        assert size == 128 * 4
    output.sum().backward()
    assert torch.equal(w.grad, x.diagonal().expand(3, -1))


def test_mlp_keeps_x_hat_its_statistics_and_the_activation_input():
    mlp = nn.Sequential(
        nn.LayerNorm(COLS), nn.Linear(COLS, 2 * COLS), nn.GELU(), nn.Linear(2 * COLS, COLS)
    )
    size, _ = kept(mlp, activation(ROWS, COLS), parameters=mlp.parameters())
    assert size == codes(ROWS, COLS) + ROWS * 4 + codes(ROWS, 2 * COLS)


def test_mlp_under_recompute_linear_keeps_x_hat_alone():
    mlp = nn.Sequential(
        nn.LayerNorm(COLS), nn.Linear(COLS, 2 * COLS), nn.GELU(), nn.Linear(2 * COLS, COLS)
    )
    policy = Policy(min_bytes=0, recompute="linear")
    size, _ = kept(mlp, activation(ROWS, COLS), parameters=mlp.parameters(), policy=policy)
    assert size == codes(ROWS, COLS) + ROWS * 4


def test_mlp_under_recompute_none_keeps_every_operand():
    mlp = nn.Sequential(
        nn.LayerNorm(COLS), nn.Linear(COLS, 2 * COLS), nn.GELU(), nn.Linear(2 * COLS, COLS)
    )
    policy = Policy(min_bytes=0, recompute="none")
    size, _ = kept(mlp, activation(ROWS, COLS), parameters=mlp.parameters(), policy=policy)
    assert size == 2 * codes(ROWS, COLS) + ROWS * 4 + 2 * codes(ROWS, 2 * COLS)


def test_q_k_v_share_their_input_and_the_projection_the_attention_output():
    query, key, value, projection = [nn.Linear(COLS, COLS) for _ in range(4)]
    heads, tokens, batch = 3, 16, 4

    def attention(x):
        q, k, v = [
            f(x).view(batch, tokens, heads, COLS // heads).transpose(1, 2)
            for f in (query, key, value)
        ]
        out = F.scaled_dot_product_attention(q, k, v)
        return projection(out.transpose(1, 2).reshape(batch, tokens, COLS))

    parameters = [p for f in (query, key, value, projection) for p in f.parameters()]
    size, _ = kept(attention, activation(batch, tokens, COLS), parameters=parameters)
    logsumexp = batch * heads * tokens * 4
    # x once for three Linears; q, k, v and the output as (batch, tokens, COLS) in memory, so groups span the heads.
    assert size == (1 + 3 + 1) * codes(batch * tokens, COLS) + logsumexp
    policy = Policy(min_bytes=0, recompute="linear")
    size, _ = kept(attention, activation(batch, tokens, COLS), parameters=parameters, policy=policy)
    assert size == (1 + 1) * codes(batch * tokens, COLS) + logsumexp


def test_one_matmul_behind_attention_and_an_activation_keeps_nothing_of_its_own():
    projection = nn.Linear(3 * COLS, COLS)
    heads, tokens, batch = 3, 16, 4

    def block(q, k, v, h):
        out = F.scaled_dot_product_attention(*[t.transpose(1, 2) for t in (q, k, v)])
        return projection(torch.cat([out.transpose(1, 2).flatten(2), F.gelu(h)], -1))

    parts = [activation(batch, tokens, heads, COLS // heads) for _ in range(3)]
    arguments = (*parts, activation(batch, tokens, 2 * COLS))
    size, _ = kept(block, *arguments, parameters=projection.parameters())
    rows, logsumexp = batch * tokens, batch * heads * tokens * 4
    assert size == 4 * codes(rows, COLS) + codes(rows, 2 * COLS) + logsumexp


def test_parts_without_a_stash_that_are_the_larger_share_are_coded_with_the_rest():
    projection = nn.Linear(3 * COLS, COLS)
    size, _ = kept(
        lambda x, y: projection(torch.cat([F.gelu(x), y], -1)),
        activation(ROWS, COLS),
        activation(ROWS, 2 * COLS),
        parameters=projection.parameters(),
    )
    assert size == codes(ROWS, COLS) + codes(ROWS, 3 * COLS)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_of_a_repeated_matmul_keeps_its_deviations_alone(norm):
    project, normalise = nn.Linear(COLS, 2 * COLS), norm(COLS)

    def head(x):
        q, k = project(x).split(COLS, -1)
        return normalise(q) * normalise(k)

    parameters = [*project.parameters(), *normalise.parameters()]
    policy = Policy(min_bytes=0, recompute="linear")
    size, output = kept(head, activation(ROWS, COLS), parameters=parameters, policy=policy)
    assert size == codes(ROWS, COLS) + 2 * ROWS * 4
    output.sum().backward()
    assert not stash.backward_cache.values


def test_softmax_and_the_matmul_behind_it_share():
    size, _ = kept(lambda x, y: x.softmax(-1) @ y, activation(4, 16, 16), activation(4, 16, 24))
    assert size == codes(64, 16) + codes(64, 24)


def test_layer_scale_keeps_nothing_more():
    linear, scale = nn.Linear(COLS, COLS), nn.Parameter(torch.ones(COLS))
    parameters = [*linear.parameters(), scale]
    for function in (
        lambda x: linear(x) * scale,
        lambda x: scale * linear(x),
        lambda x: linear(x).mul_(scale),
    ):
        # `mul_` copies back, which keeps nothing either.
        assert kept(function, activation(ROWS, COLS), parameters=parameters)[0] == codes(ROWS, COLS)


def test_masks_are_one_bit():
    assert kept(F.relu, activation(ROWS, COLS))[0] == ROWS * COLS // 8
    assert kept(F.dropout, activation(ROWS, COLS))[0] == ROWS * COLS // 8
    size, _ = kept(
        lambda x: F.linear(F.dropout(F.gelu(x)), weight),
        activation(ROWS, COLS),
        parameters=[weight := nn.Parameter(torch.randn(8, COLS))],
    )
    assert size == codes(ROWS, COLS) + ROWS * COLS // 8


def test_swiglu_keeps_its_two_inputs():
    weight = nn.Parameter(torch.randn(8, COLS))
    size, _ = kept(
        lambda a, b: F.linear(F.silu(a) * b, weight),
        activation(ROWS, COLS),
        activation(ROWS, COLS),
        parameters=[weight],
    )
    assert size == 2 * codes(ROWS, COLS)


def test_autocast_keeps_no_copy_of_a_weight():
    linear = nn.Linear(COLS, COLS)
    with torch.autocast("cpu", torch.bfloat16):
        size, _ = kept(linear, activation(ROWS, COLS), parameters=linear.parameters())
    assert size == codes(ROWS, COLS)


def test_fallback_codes_products_keeps_sizes_and_leaves_the_rest():
    assert kept(torch.square, activation(ROWS, COLS).mul(0.5))[0] == codes(ROWS, COLS)
    assert kept(lambda x: F.pad(x, (1, 1), mode="reflect"), activation(4, ROWS, COLS))[0] == 0
    for function in (torch.exp, torch.sin):
        assert kept(function, activation(ROWS, COLS))[0] == ROWS * COLS * 4


def test_norm_of_a_matrix_codes_along_the_channels():
    norm = nn.BatchNorm1d(COLS)
    size, _ = kept(norm, activation(ROWS, COLS), parameters=[*norm.parameters(), *norm.buffers()])
    assert size == codes(ROWS, COLS) + COLS * 4


def test_min_bytes_keeps_small_tensors_as_they_are():
    linear = nn.Linear(COLS, 8)
    for rows in (16, 17):
        policy = Policy(min_bytes=17 * COLS * 4)
        size, _ = kept(
            linear, activation(rows, COLS), parameters=linear.parameters(), policy=policy
        )
        assert size == (codes(rows, COLS) if rows == 17 else rows * COLS * 4)


def test_a_part_that_is_joined_is_coded_by_the_rule_of_the_linear_behind_it():
    """Its name in reports is cat's, which is no operator of a policy."""
    policy = Policy(min_bytes=0, overrides={"linear": {"bits": 4}})
    x, y = torch.randn(4, 64, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    weight = torch.randn(8, 80, requires_grad=True)
    with compress(policy) as mode:
        F.linear(torch.cat([F.gelu(x), y * 2], -1), weight).sum().backward()
    how = {key[1:3]: key[3] for key in mode.recorder.report.rows}
    assert how["cat", "input"].startswith("4 bits")
