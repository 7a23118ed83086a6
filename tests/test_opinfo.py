"""PyTorch's own samples of the covered operators, run through the interception: the forward bit for bit,
the lossless gradient to rounding, and the 8-bit one finite wherever PyTorch's is."""

import itertools

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves

from mesa_train import Policy, compress

NAMES = """
    nn.functional.linear matmul mm bmm addmm baddbmm einsum __rmatmul__
    nn.functional.scaled_dot_product_attention softmax nn.functional.layer_norm
    nn.functional.rms_norm nn.functional.group_norm nn.functional.batch_norm nn.functional.normalize
    nn.functional.conv1d nn.functional.conv2d nn.functional.conv3d nn.functional.gelu
    nn.functional.silu nn.functional.hardswish nn.functional.mish nn.functional.softplus
    nn.functional.elu nn.functional.relu nn.functional.relu6 nn.functional.leaky_relu
    nn.functional.hardsigmoid sigmoid tanh nn.functional.glu mul amax amin clamp
    nn.functional.dropout nn.functional.pad transpose reshape flatten permute unbind chunk roll flip
    exp log_softmax var std div pow sqrt where cat nn.functional.avg_pool2d
    nn.functional.max_pool2d nn.functional.multi_head_attention_forward
    nn.functional.cross_entropy nn.functional.unfold
""".split()
OPERATORS = [op for op in op_db if op.name in NAMES]
LOSSLESS, EIGHT = Policy(bits=32, min_bytes=0), Policy(min_bytes=0)
MOST = 25  # samples of an operator


def run(op, sample, policy=None):
    """Outputs and gradients, from the same random numbers."""
    torch.manual_seed(0)
    given = (sample.input, *sample.args, *sample.kwargs.values())
    leaves = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor) and t.requires_grad]
    if policy is None:
        output = op(sample.input, *sample.args, **sample.kwargs)
    else:
        with compress(policy):
            output = op(sample.input, *sample.args, **sample.kwargs)
    outputs = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
    trained = [t for t in outputs if t.requires_grad]
    grads = [
        torch.linspace(1, 2, max(t.numel(), 1))[: t.numel()].view(t.shape).to(t) for t in trained
    ]
    if not trained:
        return outputs, []
    return outputs, torch.autograd.grad(trained, leaves, grads, allow_unused=True)


def test_every_name_is_pytorchs():
    assert not set(NAMES) - {op.name for op in op_db}


@pytest.mark.parametrize(
    "op",
    OPERATORS,
    ids=[f"{op.name}{'.' * bool(op.variant_test_name)}{op.variant_test_name}" for op in OPERATORS],
)
@pytest.mark.filterwarnings("ignore")
def test_samples(op):
    dtype = torch.float64
    samples = op.sample_inputs("cpu", dtype, requires_grad=True)
    count = 0
    for sample in itertools.islice(samples, MOST):
        expected, gradients = run(op, sample)
        for policy in (LOSSLESS, EIGHT):
            found, coded = run(op, sample, policy)
            for f, e in zip(found, expected, strict=True):
                assert torch.equal(f, e) or (f.isnan() == e.isnan()).all()
            for f, e in zip(coded, gradients, strict=True):
                assert (f is None) == (e is None)
                if e is None:
                    continue
                assert f.shape == e.shape
                if policy is LOSSLESS:
                    torch.testing.assert_close(f, e, equal_nan=True)
                else:
                    assert (f.isfinite() | ~e.isfinite()).all()
        count += 1
    assert count
