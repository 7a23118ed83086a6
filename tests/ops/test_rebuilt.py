"""Bytes that chains of operators save, storage by storage: what is rebuilt is not saved."""

import pytest
import torch
import torch.nn.functional as F
from stash_helpers import activation, codes, kept
from torch import nn

from mesa_train import PRESETS, Policy

EIGHT = Policy(min_bytes=0)
RECOMPUTE = Policy(min_bytes=0, recompute="linear")
ROWS, COLS = 64, 128


def image():
    return activation(2, 8, 16, 16)


STEPS = {
    "relu": F.relu,
    "relu in place": F.relu_,
    "relu6": nn.ReLU6(inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1, inplace=True),
    "clamp": lambda x: x.clamp(0, 1),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_behind_a_norm_saves_one_bit(name):
    weight = nn.Parameter(torch.randn(4, 8, 3, 3))

    def function(x, step=lambda x: x):
        return F.conv2d(step(F.batch_norm(x, None, None, training=True)), weight)

    without = kept(function, image(), parameters=(weight,), policy=EIGHT)[0]
    size = kept(function, image(), STEPS[name], parameters=(weight,), policy=EIGHT)[0]
    assert size == without + 2 * 8 * 16 * 16 // 8


def test_an_activation_in_place_is_rebuilt():
    weight = nn.Parameter(torch.randn(4, 8, 3, 3))

    def function(x, inplace):
        x = F.batch_norm(x, None, None, training=True)
        return F.conv2d(F.silu(x, inplace=inplace), weight)

    sizes = [kept(function, image(), i, parameters=(weight,), policy=EIGHT)[0] for i in (0, 1)]
    assert sizes[0] == sizes[1]


def test_a_pool_saves_one_byte_an_offset():
    pooled = 2 * 8 * 8 * 8
    for policy in (EIGHT, PRESETS["lossless"]):
        assert kept(lambda x: F.max_pool2d(x, 3, 2, 1), image(), policy=policy)[0] == pooled
        assert kept(lambda x: x.flatten(2).max(1).values, image(), policy=policy)[0] == 2 * 256


def test_a_bool_mask_is_saved_once_for_all_layers():
    mask = torch.rand(4, 1, 64, 64) > 0.2
    mask[..., 0] = True

    def function(x, layers):
        for _ in range(layers):
            x = F.scaled_dot_product_attention(x, x, x, mask)
        return x

    x = torch.randn(4, 2, 64, 16).requires_grad_()
    one, two = [kept(function, x * 1, n, policy=PRESETS["lossless"])[0] for n in (1, 2)]
    layer = 4 * 2 * 64 * 16 * 4 + 4 * 2 * 64 * 4  # the output, and the logsumexp
    assert two - one == layer
    assert one == 2 * layer - 4 * 2 * 64 * 4 + mask.numel() // 8


def test_a_mask_of_two_factors_is_rebuilt_from_them():
    """Relative positions of SAM and MViT: one term for rows, one for columns."""

    def function(q, rows, columns):
        return F.scaled_dot_product_attention(q, q, q, (rows + columns).reshape(2, 2, 64, 64))

    q, rows, columns = [activation(2, 2, 64, *s) for s in ((16,), (8, 1), (1, 8))]
    size = kept(function, q, rows, columns, policy=RECOMPUTE)[0]
    # Codes of q, k and v as one tensor, and both factors.
    assert size == codes(2 * 2 * 64, 16) + rows.nbytes + columns.nbytes


def test_a_norm_of_single_operations_is_rebuilt_from_its_linear():
    up, down = nn.Linear(COLS, COLS, bias=False), nn.Linear(COLS, COLS, bias=False)
    gain = nn.Parameter(torch.rand(COLS))

    def function(x):
        h = up(x)
        return down(gain * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)))

    parameters = (up.weight, down.weight, gain)
    size = kept(function, activation(ROWS, COLS), parameters=parameters, policy=RECOMPUTE)[0]
    # Codes of x, and for each row what rsqrt saves.
    assert size == codes(ROWS, COLS) + ROWS * 4


def test_a_gate_is_rebuilt_from_its_linears():
    gate, up, down = [nn.Linear(COLS, COLS, bias=False) for _ in range(3)]
    parameters = (gate.weight, up.weight, down.weight)
    size = kept(
        lambda x: down(F.silu(gate(x)) * up(x)),
        activation(ROWS, COLS),
        parameters=parameters,
        policy=RECOMPUTE,
    )[0]
    assert size == codes(ROWS, COLS)


def test_quick_gelu_saves_its_input_once():
    linear = nn.Linear(COLS, COLS, bias=False)
    size = kept(
        lambda x: linear(x * torch.sigmoid(1.702 * x)),
        activation(ROWS, COLS),
        parameters=(linear.weight,),
        policy=EIGHT,
    )[0]
    assert size == codes(ROWS, COLS)


def test_losses_save_one_tensor_of_codes():
    logits, target = activation(ROWS, COLS), torch.randint(0, COLS, (ROWS,))
    size = kept(lambda x: F.cross_entropy(x, target, reduction="sum"), logits, policy=EIGHT)[0]
    assert size == codes(ROWS, COLS) + target.nbytes
    pair = activation(ROWS, COLS), activation(ROWS, COLS)
    assert kept(F.mse_loss, *pair, policy=EIGHT)[0] == codes(ROWS, COLS)
