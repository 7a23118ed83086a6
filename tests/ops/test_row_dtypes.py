"""Every row answers in PyTorch's dtypes: outputs, gradients, and what a stash rebuilds, under every autocast."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from operator_case import call, error, gradients, tensors
from operator_cases import CASES

from mesa_train import Policy, compress
from mesa_train.measure.fake_tensors import FakeModel
from mesa_train.stash.stash import strip, value

half, brain, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64

# Input dtype, autocast's dtype (None: off), forward. The bfloat16 of test_operators.py is not tried again.
ON_CPU = [
    (half, None, "exact"),
    (half, half, "exact"),
    (single, half, "exact"),
    (double, brain, "exact"),
    (half, None, "fused"),
    (brain, brain, "fused"),
    (single, half, "fused"),
]
ON_CUDA = [
    (brain, None, "exact"),
    (half, brain, "exact"),
    (single, half, "exact"),
    (double, brain, "exact"),
    (brain, brain, "fused"),
    (single, half, "fused"),
]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths",
    "ignore:Mismatch dtype between input",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # FakeTensorMode asks for it
)


def described(outputs):
    return [(o.dtype, o.shape) for o in outputs]


def attempt(function):
    """(what it returned, None), or (None, why PyTorch refuses these dtypes)."""
    try:
        return function(), None
    except (RuntimeError, NotImplementedError) as refusal:
        return None, str(refusal)


@pytest.mark.parametrize("case", [c for c in CASES if not c.fallback], ids=str)
def test_on_a_cpu(case):
    for dtype, autocast, forward in ON_CPU:

        def results(policy, dtype=dtype, autocast=autocast):
            with torch.autocast("cpu", autocast or brain, enabled=autocast is not None):
                made = tensors(case, dtype)
                outputs = call(case, made, policy)
            return outputs, gradients(outputs, made.leaves)

        what = f"{dtype}, autocast to {autocast}, forward {forward}"
        plain, refusal = attempt(lambda results=results: results(None))
        ours, also = attempt(
            lambda results=results, forward=forward: results(Policy(min_bytes=0, forward=forward))
        )
        assert (refusal is None) == (also is None), f"{what}: {refusal or also}"
        if refusal is not None:
            continue
        (expected, expected_grads), (found, found_grads) = plain, ours
        assert described(found) == described(expected), what
        assert described(found_grads) == described(expected_grads), what
        if forward == "exact":
            for f, e in zip(found, expected, strict=True):
                assert torch.equal(f.nan_to_num(7), e.nan_to_num(7)), what
        # Both round to autocast's dtype: 8 bits of mantissa in bfloat16, 11 in float16.
        rounding = 0.02 if brain in (dtype, autocast) else 0.004
        wide = [[g.double() for g in grads] for grads in (found_grads, expected_grads)]
        # A group of two elements cancels all but eps / variance of its gradient, and each code's error shows.
        bound = 1.0 if case.name == "group_norm 2-D" else case.eight + rounding
        assert error(*wide) < bound, what


@contextlib.contextmanager
def cuda_autocast(dtype):
    """`torch.autocast("cuda")`, which switches itself off where there is no GPU."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


# One case of every row that computes.
ROWS = """linear 3-D;matmul N-D N-D;addmm;einsum ij,kj->ikj;attention;attention bool mask;torch.softmax
softmax and matmul;layer_norm;layer_norm and linear;rms_norm;rms_norm without weight;group_norm 4-D
batch_norm 4-D training=True;batch_norm 4-D training=False;normalize dim=-1;conv2d;gelu;gelu tanh;silu
relu;relu6;leaky_relu;hardswish;mish;softplus;elu;hardsigmoid;torch.sigmoid;torch.tanh;glu;amax;clamp
dropout;MLP;SwiGLU;layer scale;gate;cat used twice"""
BY_NAME = {case.name: case for case in CASES}
NAMES = ROWS.replace("\n", ";").split(";")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_on_a_fake_gpu(name):
    case = BY_NAME[name]
    for dtype, autocast, forward in ON_CUDA:
        made, fakes = tensors(case, dtype), FakeModel(torch.device("cuda"))

        def outputs(policy, made=made, fakes=fakes, autocast=autocast):
            with fakes.on(), cuda_autocast(autocast):
                given = []
                for tensor in made.arguments:
                    fake = fakes.of(tensor.detach()).requires_grad_(tensor.requires_grad)
                    given.append(fake if tensor.is_leaf else fake * 1)
                with contextlib.nullcontext() if policy is None else compress(policy) as mode:
                    output = case.function(*given)
                    rebuilt = None if policy is None else remade(mode, output)
            return output, rebuilt

        what = f"{dtype}, autocast to {autocast}, forward {forward}"
        plain, refusal = attempt(lambda outputs=outputs: outputs(None))
        ours, also = attempt(
            lambda outputs=outputs, forward=forward: outputs(Policy(min_bytes=0, forward=forward))
        )
        assert (refusal is None) == (also is None), f"{what}: {refusal or also}"
        if refusal is None:
            assert described([ours[0]]) == described([plain[0]]), what
            assert ours[1] is None or described([ours[1]]) == described([plain[0]]), what


def remade(mode, output):
    """What the lineage rebuilds for an output; None if it has no stash."""
    stash = mode.recorder.lineage.get(output)
    if stash is None:
        return None
    kept = []
    spec = strip(stash, kept, {}, {})
    with torch.no_grad():
        return value(spec, kept)


@pytest.mark.parametrize("policy", ["lossless", "mesa8"])
@pytest.mark.parametrize("dtype", [half, brain, single])
@pytest.mark.parametrize("forward", ["exact", "fused"])
@pytest.mark.parametrize("size", [1.0, 0.03, 1e-4])
def test_rms_norm_without_eps_takes_that_of_float32(policy, dtype, forward, size):
    options = {"bits": 32} if policy == "lossless" else {}
    x = (torch.randn(6, 32) * size).to(dtype).requires_grad_()
    gradient = torch.randn(6, 32)
    wide = x.detach().double().requires_grad_()
    rms = (wide.square().mean(-1, keepdim=True) + torch.finfo(single).eps).sqrt()
    (expected,) = torch.autograd.grad(wide / rms, wide, gradient.double())
    with compress(Policy(min_bytes=0, forward=forward, **options)):
        y = F.rms_norm(x * 1, (32,))
    (found,) = torch.autograd.grad(y, x, gradient.to(dtype))
    # Two roundings of the dtype, and 8 bits of codes; the input dtype's epsilon is 68 % off at 0.03.
    bound = 2 * torch.finfo(dtype).eps + (0 if options else 0.02)
    assert (found.double() - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("dtype", [half, brain])
def test_batch_norm_of_constants_takes_the_deviation_in_float32(dtype):
    x = torch.randn(4, 6, 5).to(dtype).requires_grad_()
    mean, variance = torch.randn(6).to(dtype), (torch.rand(6) + 0.1).to(dtype)
    (expected,) = torch.autograd.grad(F.batch_norm(x, mean, variance).float().sin().sum(), x)
    with compress(Policy(bits=32, min_bytes=0)):
        y = F.batch_norm(x, mean, variance)
    (found,) = torch.autograd.grad(y.float().sin().sum(), x)
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=0)
