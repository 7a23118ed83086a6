"""The backward of short half-precision attention on a CPU, which rebuilds the attention weights."""

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch

from mesa_train import compress
from mesa_train.policy import Policy

LOSSLESS = Policy(bits=32)


def operands(shape, keys=None, dtype=torch.bfloat16):
    seed_torch(0)
    batch, heads, tokens, width = shape
    lengths = (tokens, keys or tokens, keys or tokens)
    return [
        torch.randn(batch, n, heads, width).to(dtype).transpose(1, 2).requires_grad_()
        for n in lengths
    ]


def gradients(inputs, grad, policy=None, **options):
    """Gradients of q, k, v and the operands that were kept."""
    if policy is None:
        out = F.scaled_dot_product_attention(*inputs, **options)
        return torch.autograd.grad(out, inputs, grad), None
    with compress(policy) as mode:
        out = F.scaled_dot_product_attention(*inputs, **options)
    kept = {
        operand for _, operator, operand, _ in mode.recorder.report.rows if operator == "attention"
    }
    return torch.autograd.grad(out, inputs, grad), kept


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize(
    ("shape", "keys"),
    [((2, 3, 50, 16), None), ((1, 1, 7, 8), 33), ((3, 5, 1, 24), 197), ((4, 6, 197, 32), None)],
)
def test_as_close_as_the_fused_backward(shape, keys, scale, dtype):
    inputs = operands(shape, keys, dtype)
    grad = torch.randn(shape).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected, _ = gradients(exact, grad.double(), scale=scale)
    plain, _ = gradients(inputs, grad, scale=scale)
    ours, kept = gradients(inputs, grad, LOSSLESS, scale=scale)
    assert kept == {"q", "k", "v"}
    for mine, theirs, truth in zip(ours, plain, expected, strict=True):
        assert mine.dtype is dtype
        # Both round the weights and their gradient to half precision, at different places; for a
        # few tokens PyTorch keeps float32 throughout, and one rounding of each is the bound.
        bound = max(2 * error(theirs, truth), torch.finfo(dtype).eps)
        assert error(mine, truth) <= bound


def test_large_scores():
    """Scores of about 100, where half precision would be off by several tenths."""
    q, k, v = operands((1, 2, 40, 16))
    inputs = [(t.detach() * c).requires_grad_() for t, c in ((q, 6), (k, 6), (v, 1))]
    grad = torch.randn(q.shape).bfloat16()
    expected, _ = gradients([t.detach().double().requires_grad_() for t in inputs], grad.double())
    ours, _ = gradients(inputs, grad, LOSSLESS)
    for mine, truth in zip(ours, expected, strict=True):
        assert error(mine, truth) < 0.02


@pytest.mark.parametrize("batch", [1, 3])
def test_the_number_of_heads_at_a_time_does_not_matter(monkeypatch, batch):
    from mesa_train.kernels import short_attention

    inputs = operands((batch, 5, 23, 8))
    grad = torch.randn(inputs[0].shape).bfloat16()
    together, _ = gradients(inputs, grad, LOSSLESS)
    monkeypatch.setattr(short_attention, "_SCORES_BYTES", 0)
    apart, _ = gradients(inputs, grad, LOSSLESS)
    for a, b in zip(together, apart, strict=True):
        assert error(a, b.double()) < 0.01


@pytest.mark.parametrize(
    ("tokens", "options"), [(600, {}), (20, {"is_causal": True}), (20, {"mask": True})]
)
def test_the_others_keep_their_output(tokens, options):
    inputs = operands((1, 2, tokens, 8))
    if options.pop("mask", False):
        options["attn_mask"] = torch.zeros(tokens, tokens, dtype=torch.bfloat16)
    grad = torch.randn(inputs[0].shape).bfloat16()
    plain, _ = gradients(inputs, grad, **options)
    ours, kept = gradients(inputs, grad, LOSSLESS, **options)
    assert "out" in kept
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_frozen_operands_get_none():
    q, k, v = operands((1, 2, 9, 8))
    k.requires_grad_(False)
    with compress(LOSSLESS):
        F.scaled_dot_product_attention(q, k, v).float().sum().backward()
    assert q.grad is not None
    assert k.grad is None
    assert v.grad is not None


def test_a_compiled_backward_is_the_same():
    torch._dynamo.reset()

    def attend(q, k, v):
        with compress(LOSSLESS):
            return F.scaled_dot_product_attention(q * 2, k * 2, v * 2)

    inputs = operands((2, 3, 50, 16))
    grad = torch.randn(inputs[0].shape).bfloat16()
    expected = torch.autograd.grad(attend(*inputs), inputs, grad)
    found = torch.autograd.grad(
        torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs), inputs, grad
    )
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    torch._dynamo.reset()


def test_the_operator():
    inputs = [t.detach() for t in operands((2, 3, 5, 8), 7)]
    grad = torch.randn(2, 3, 5, 8).bfloat16()
    operator = torch.ops.mesa_train.short_attention_backward.default
    torch.library.opcheck(operator, (grad, *inputs, 0.3))
    q, k, v = inputs
    with pytest.raises(RuntimeError, match=r"v is torch.float32, but grad torch.bfloat16"):
        operator(grad, q, k, v.float(), 0.3)
    with pytest.raises(RuntimeError, match="q must be 4-D"):
        operator(grad, q[0], k, v, 0.3)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        operator(grad, q, k[:, :2], v, 0.3)
