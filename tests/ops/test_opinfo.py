"""PyTorch's own samples of every differentiable function, run through the interception: the forward bit for bit,
the lossless gradient to rounding, the 8-bit one within a bound, and a graph that is freed without a backward.

Each function runs on its first sample, and on a later one with strides, since PyTorch orders samples from plain to
special: empty, broadcast. The in-place form runs on the first. scripts/bench/sweep_opinfo.py runs every sample."""

import gc
import itertools
import weakref

import pytest
import torch
from seeding import seed_torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map

from mesa_train import Policy, compress

LOSSLESS, EIGHT = Policy(bits=32, min_bytes=0), Policy(min_bytes=0)
MOST = 4  # samples that are looked at, of which two are run

# Largest error of an 8-bit gradient, relative L2. Samples lie within +-9, so that softmaxes saturate (13 % for
# attention, whose gradient then is small); all else is under 4 %.
BOUND = 0.15
# A gradient smaller than this per element is one of a saturated or degenerate sample: a norm of two elements, say.
LEAST = 0.1
# Logits of thousands, from projections of inputs and weights that all lie within +-9: where q and k are off by a step
# of a code, another key wins the softmax. Whether gradients are finite is still compared.
SATURATED = {"nn.functional.multi_head_attention_forward"}
# What a gradient is taken of is no function of the input: eigenvectors have a free phase, a layout has no copy.
# A view of more memory than the sample has was given to it.
LEFT_OUT = {"linalg.eig", "view_as_complex", "to_sparse", "as_strided.partial_views"}


def name_of(op):
    return f"{op.name}{'.' * bool(op.variant_test_name)}{op.variant_test_name}"


OPERATORS = [
    op
    for op in op_db
    if op.supports_autograd
    and torch.float64 in op.supported_backward_dtypes("cpu")
    and name_of(op) not in LEFT_OUT
]


def samples_of(op):
    samples = list(
        itertools.islice(op.sample_inputs("cpu", torch.float64, requires_grad=True), MOST)
    )
    # What as_strided reads of an input depends on its strides, and a copy has other memory.
    if len(samples) > 1 and not op.name.startswith(("sparse.", "as_strided")):
        return [samples[0], samples[-1].noncontiguous()]
    return samples[:1]


def run(call, sample, policy=None):
    """(outputs, gradients) of a sample, from the same random numbers."""
    seed_torch(0)
    # Activations, no leaves: a leaf that needs a gradient is taken for a parameter, which is never coded.
    given = (sample.input, sample.args, sample.kwargs)
    leaves = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor) and t.requires_grad]
    input, args, kwargs = tree_map(activation, given)
    if policy is None:
        output = call(input, *args, **kwargs)
    else:
        with compress(policy):
            output = call(input, *args, **kwargs)
    outputs = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
    trained = [t for t in outputs if t.requires_grad]
    grads = [
        torch.linspace(1, 2, max(t.numel(), 1)).to(t.dtype)[: t.numel()].view(t.shape)
        if t.layout is torch.strided
        else torch.ones_like(t)
        for t in trained
    ]
    if not trained:
        return outputs, []
    return outputs, torch.autograd.grad(trained, leaves, grads, allow_unused=True)


def activation(value):
    """A copy with the same strides, no leaf and no view of one."""
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return value
    if value.layout is not torch.strided or 0 in value.stride():
        return value.clone()
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)


def compare(call, sample):
    """Assert that both policies agree with plain PyTorch; return the error of 8 bits."""
    expected, gradients = run(call, sample)
    worst = 0.0
    for policy in (LOSSLESS, EIGHT):
        found, coded = run(call, sample, policy)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=0, atol=0, equal_nan=True)
        for f, e in zip(coded, gradients, strict=True):
            assert (f is None) == (e is None)
            if e is None:
                continue
            assert f.shape == e.shape
            if policy is LOSSLESS:
                torch.testing.assert_close(f, e, equal_nan=True)
            elif e.layout is torch.strided:
                assert (f.isfinite() | ~e.isfinite()).all()
                if e.isfinite().all() and e.numel():
                    size = max(e.norm().item(), LEAST * e.numel() ** 0.5)
                    worst = max(worst, (f - e).norm().item() / size)
    return worst


def in_place(op):
    """The in-place form on a copy."""
    return lambda input, *args, **kwargs: op.inplace_variant(input.clone(), *args, **kwargs)


class Mark:
    """Lives as long as a node of a graph that it is attached to."""


def freed(call, sample, policy):
    """Whether the graph of a call goes with its output, without a backward and without the collector of cycles. The
    input is a leaf, as in the report of a graph that stayed: its function's output was taken for a weight's copy."""
    marks = []
    input, args, kwargs = sample.input, sample.args, sample.kwargs
    with compress(policy):
        output = call(input, *args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.metadata["mark"] = mark = Mark()
                marks.append(weakref.ref(mark))
                del mark
        tensor = None
    del output, input, args, kwargs
    return all(mark() is None for mark in marks)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS, ids=map(name_of, OPERATORS))
@pytest.mark.filterwarnings("ignore")
def test_function(op):
    samples = samples_of(op)
    assert samples
    for sample in samples:
        assert compare(op, sample) <= BOUND or op.name in SATURATED
    gc.disable()
    try:
        # Where nothing is coded, an output that is saved is the very tensor.
        assert freed(op, samples[0], LOSSLESS)
        assert freed(op, samples[0], Policy())
    finally:
        gc.enable()


IN_PLACE = [op for op in OPERATORS if op.inplace_variant is not None]


@pytest.mark.slow
@pytest.mark.parametrize("op", IN_PLACE, ids=map(name_of, IN_PLACE))
@pytest.mark.filterwarnings("ignore")
def test_in_place(op):
    written, sample = (
        in_place(op),
        next(iter(op.sample_inputs("cpu", torch.float64, requires_grad=True))),
    )
    try:
        run(written, sample)
    except RuntimeError as error:
        pytest.skip(f"PyTorch refuses it: {str(error)[:60]}")
    assert compare(written, sample) <= BOUND
