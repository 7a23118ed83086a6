"""Bytes that chains of operators save, storage by storage: what is rebuilt is not saved."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch
from stash_helpers import activation, codes, kept
from torch import nn

from mesa_train import PRESETS, Policy, compress

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


# No other test draws from this generator: if x were these logits, the gradient would be 0.
SHARES = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(7)).softmax(-1)
CLASSES = torch.arange(ROWS)
WEIGHT = torch.rand(COLS)
LOSSES = {
    "cross_entropy": (lambda x, t: F.cross_entropy(x, t, reduction="sum"), CLASSES),
    "smoothing": (lambda x, t: F.cross_entropy(x, t, None, None, -1, None, "sum", 0.1), CLASSES),
    "weights": (lambda x, t: F.cross_entropy(x, t, WEIGHT, reduction="sum"), CLASSES),
    "soft targets": (F.cross_entropy, SHARES),
    "binary": (F.binary_cross_entropy_with_logits, SHARES),
    "logsigmoid": (lambda x, t: F.logsigmoid(x).sum(), CLASSES),
    "mse_loss": (F.mse_loss, SHARES),
    "smooth_l1_loss": (F.smooth_l1_loss, SHARES),
    "huber_loss": (nn.HuberLoss(), SHARES),
    "log_softmax": (lambda x, t: nn.LogSoftmax(1)(x), SHARES),
    "kl_div": (lambda x, t: F.kl_div(x.log_softmax(1), t, reduction="sum"), SHARES),
    "DINO": (lambda x, t: torch.sum(-t * F.log_softmax(x / 0.1, -1), dim=-1).mean(), SHARES),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_save_one_tensor_of_codes(name):
    """No second tensor: neither logarithms nor targets."""
    function, target = LOSSES[name]
    with compress(EIGHT):
        loss = function(activation(ROWS, COLS), target)
    # The numbers of rows and factors take some bytes.
    assert codes(ROWS, COLS) <= saved_bytes(loss) < codes(ROWS, COLS) + 64


def saved_bytes(loss):
    """Bytes of the storages that the graph of a loss holds, each once.

    Nodes that left the graph have passed their tensors to the hooks too, and have freed them.
    """
    seen, todo, storages = set(), [loss.grad_fn], {}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        names = [n for n in dir(node) if n.startswith("_saved_")]
        tensors = [getattr(node, n) for n in names] + list(getattr(node, "saved_tensors", ()))
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def test_l1_loss_saves_two_bits():
    target = torch.randn(ROWS, COLS)
    size = kept(F.l1_loss, activation(ROWS, COLS), target, policy=EIGHT)[0]
    assert size == 2 * ROWS * COLS // 8


def test_scores_of_all_pairs_are_rebuilt():
    """CLIP's and SigLIP's losses with `recompute="linear"`: codes of both sides, and no scores."""
    labels = torch.arange(ROWS)

    def clip(x, y, t):
        scores = x @ y.T / t
        return F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)

    def siglip(x, y, t):
        scores = t.exp() * x @ y.T + t
        return -F.logsigmoid((2 * torch.eye(ROWS) - 1) * scores).sum()

    sides = activation(ROWS, 48), activation(ROWS, 48)
    both = 2 * codes(ROWS, 48)
    small = 64 + labels.nbytes
    assert kept(clip, *sides, 0.1, policy=RECOMPUTE)[0] <= both + small
    assert kept(siglip, *sides, nn.Parameter(torch.zeros(1)), policy=RECOMPUTE)[0] <= both + small
    # Labels that are made of numbers take no bytes without the preset either.
    size = kept(siglip, *sides, nn.Parameter(torch.zeros(1)), policy=EIGHT)[0]
    assert size <= both + codes(ROWS, ROWS) + small


def test_a_solved_cross_entropy_keeps_the_size_of_its_gradient():
    """Codes of probabilities have errors as large as the gradient where the model is sure."""
    seed_torch(0)
    target = torch.randint(0, COLS, (ROWS,))
    for sure in (2.0, 8.0, 12.0):
        logits = sure * F.one_hot(target, COLS) + torch.randn(ROWS, COLS)
        found, expected = [], []
        for policy, results in ((None, expected), (EIGHT, found)):
            x = logits.clone().requires_grad_()
            with compress(policy) if policy else contextlib.nullcontext():
                loss = F.cross_entropy(x * 1, target)
            results += torch.autograd.grad(loss, x)
        error = (found[0] - expected[0]).norm() / expected[0].norm()
        assert error < 0.02
        small = expected[0].abs() < expected[0].abs().max() / 100
        pull = found[0][small].sum(), expected[0][small].sum()
        assert abs(pull[0] / pull[1] - 1) < 0.02


def test_a_target_may_change_before_the_sum():
    """The sum then knows no derivative. The product has codes of the first values."""
    x, target = activation(ROWS, COLS), SHARES.clone()
    with compress(EIGHT):
        product = target * x.log_softmax(-1)
        target.zero_()
        (grad,) = torch.autograd.grad(product.sum(), x)
    (expected,) = torch.autograd.grad((SHARES * x.log_softmax(-1)).sum(), x)
    assert (grad - expected).norm() < 0.03 * expected.norm()


def test_small_derivatives_beside_a_large_one_keep_their_size():
    """SigLIP's negatives pull together as much as the positive in their row pushes."""
    seed_torch(0)
    scores = 8 + torch.randn(ROWS, COLS)
    scores[range(ROWS), range(ROWS)] = 0
    x = scores.requires_grad_()
    with compress(EIGHT):
        loss = F.logsigmoid(x * 1).sum()
    (found,) = torch.autograd.grad(loss, x)
    negatives = scores > 1
    expected = torch.sigmoid(-scores)[negatives].sum()
    assert abs(found[negatives].sum() / expected - 1) < 0.05
