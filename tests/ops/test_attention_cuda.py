"""The fused attention kernels of a GPU.

Three means check them without a GPU: their schemas on tensors without data; kernels on the CPU that
compute the same numbers and refuse what the real ones refuse; and PyTorch's own choice on fake
tensors. Where there is a GPU, outputs and gradients are compared with PyTorch's."""

import math

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from mesa_train import Policy, compress
from mesa_train.engine import native
from mesa_train.engine.intercept import CompressionMode
from mesa_train.ops import attention, attention_cuda
from mesa_train.utils import attention_backend

SHAPE = (2, 4, 64, 32)
EXACT = Policy(bits=32, min_bytes=0)


def packed(tokens, heads=4, width=16, **options):
    """q, k and v as views of one tensor, as a ViT makes them, and the tensor."""
    qkv = torch.randn(2, tokens, 3, heads, width, **options).requires_grad_()
    return [qkv[:, :, i].transpose(1, 2) for i in range(3)], qkv


def mask_of(kind, tokens, trained=False, heads=4, **options):
    """One of `MASKS`: the leaf, which needs a gradient if it is trained, and the mask of it."""
    if kind == "bool":
        keep = torch.rand(2, 1, tokens, tokens, device=options.get("device")) > 0.3
        return keep, keep
    shape = {
        "per head": (heads, tokens, tokens),
        "table": (tokens * tokens, heads),
        "slice": (heads, tokens, tokens + 3),
        "two dims": (tokens, tokens),
        "one row": (2, 1, 1, tokens),
    }[kind]
    leaf = torch.randn(shape, **options).requires_grad_(trained)
    if kind == "table":  # as relative positions are looked up: the heads are the last dim
        return leaf, leaf.view(tokens, tokens, heads).permute(2, 0, 1)[None]
    if kind == "slice":
        return leaf, leaf[None, ..., 3:]
    return leaf, leaf[None] if kind == "per head" else leaf


MASKS = ["per head", "table", "slice", "two dims", "one row", "bool"]


@pytest.mark.parametrize(
    ("backend", "masked"),
    [("FLASH", False), ("EFFICIENT", False), ("EFFICIENT", True), ("CUDNN", False)],
)
def test_gradients_have_the_inputs_shapes(backend, masked, monkeypatch):
    # PyTorch cannot be asked for its choice where there is no GPU.
    monkeypatch.setattr(attention, "_backend", lambda *_: getattr(attention, f"_{backend}"))
    with FakeTensorMode():
        inputs = [
            torch.empty(SHAPE, device="cuda", dtype=torch.bfloat16, requires_grad=True).mul(1)
            for _ in range(3)
        ]
        mask = None
        if masked:
            mask = torch.empty(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
            mask = mask.requires_grad_().mul(1)
        with compress(Policy(min_bytes=0)):
            output = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
        # Not through the engine, which would ask for a device.
        gradients = [g for g in output.grad_fn.apply(torch.empty_like(output)) if g is not None]
    wanted = inputs if mask is None else [*inputs, mask]
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in wanted]
    assert output.shape == SHAPE
    assert type(output.grad_fn).__name__.lower().startswith(backend.lower())


class Emulated:
    """The kernels of a GPU, on the CPU: the same results, and errors where the real ones raise."""

    def __init__(self):
        self.library = torch.library.Library("aten", "IMPL")
        self.biases = []
        for kernel in ("flash", "efficient", "cudnn"):
            name = f"_scaled_dot_product_{kernel}_attention"
            self.library.impl(name, getattr(self, kernel), "CPU")
            self.library.impl(f"{name}_backward", getattr(self, f"{kernel}_backward"), "CPU")

    def scores(self, q, k, bias, causal, scale):
        scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            assert bias.dtype == q.dtype
            scores = scores + bias
        if causal:
            scores = scores.masked_fill(
                ~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf
            )
        return scores

    def forward(self, q, k, v, bias, causal, scale):
        self.biases.append(bias)
        scores = self.scores(q, k, bias, causal, scale)
        lse = scores.logsumexp(-1)
        return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse

    def backward(self, grad, q, k, v, bias, out, lse, causal, scale):
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        weights = (self.scores(q, k, bias, causal, scale) - lse[..., None]).exp()
        g = grad.float()
        rows = (g * out.float()).sum(-1, keepdim=True)
        dscores = weights * (g @ v.float().mT - rows)
        found = (dscores @ k.float() * factor, dscores.mT @ q.float() * factor, weights.mT @ g)
        return (*[t.to(q.dtype) for t in found], dscores.to(q.dtype))

    def no_seed(self):
        return torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)

    def flash(self, q, k, v, dropout_p=0.0, causal=False, debug=False, *, scale=None):
        if q.shape[-1] % 8:
            raise RuntimeError("flash attention: the head dim must be a multiple of 8")
        lengths = (None, None, q.shape[2], k.shape[2])
        return (
            *self.forward(q, k, v, None, causal, scale),
            *lengths,
            *self.no_seed(),
            q.new_empty(0),
        )

    def flash_backward(self, grad, q, k, v, out, lse, *rest, scale=None):
        assert grad.shape[-1] == q.shape[-1] == out.shape[-1]
        return self.backward(grad, q, k, v, None, out, lse, rest[5], scale)[:3]

    def check_bias(self, bias):
        if bias is not None and (bias.stride(-1) != 1 or any(n % 8 for n in bias.stride()[:-1])):
            raise RuntimeError(f"efficient attention: bias of strides {bias.stride()}")

    def efficient(self, q, k, v, bias, lse, dropout_p=0.0, causal=False, *, scale=None):
        self.check_bias(bias)
        return (*self.forward(q, k, v, bias, causal, scale), *self.no_seed())

    def efficient_backward(
        self,
        grad,
        q,
        k,
        v,
        bias,
        out,
        lse,
        seed,
        offset,
        dropout_p,
        needs,
        causal=False,
        *,
        scale=None,
    ):
        self.check_bias(bias)
        found = self.backward(grad, q, k, v, bias, out, lse, causal, scale)
        return tuple(t if need else None for t, need in zip(found, needs, strict=True))

    def cudnn(self, q, k, v, bias, lse, dropout_p=0.0, causal=False, debug=False, *, scale=None):
        lengths = (None, None, q.shape[2], k.shape[2])
        return (
            *self.forward(q, k, v, bias, causal, scale),
            *lengths,
            *self.no_seed(),
            q.new_empty(0),
        )

    def cudnn_backward(self, grad, q, k, v, out, lse, seed, offset, bias, *rest, scale=None):
        return self.backward(grad, q, k, v, bias, out, lse, rest[5], scale)[:3]


@pytest.fixture
def emulated(monkeypatch):
    """Attention on the CPU goes to the emulated kernels: `emulated("efficient")` chooses one."""
    kernels = Emulated()

    def use(backend):
        monkeypatch.setattr(attention, "_backend", lambda *_: attention._FLASH)
        monkeypatch.setattr(attention, "_flash_cpu", getattr(attention_cuda, backend))
        return kernels

    # The native rows call the CPU's kernel themselves.
    with native.python_rows(CompressionMode):
        yield use
    kernels.library._destroy()


def gradients_of(inputs, call):
    output = call()
    grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output, torch.autograd.grad(output, inputs, grad)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tokens", [49, 64, 197])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_the_efficient_kernel(emulated, kind, tokens, trained):
    if kind == "bool" and trained:
        pytest.skip("a bool mask has no gradient")
    seed_torch(0)
    (q, k, v), qkv = packed(tokens)
    leaf, mask = mask_of(kind, tokens, trained)
    wanted = [qkv, *([leaf] if trained else [])]
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients_of(wanted, lambda: F.scaled_dot_product_attention(q, k, v, mask))
    kernels = emulated("efficient")

    def call():
        with compress(EXACT):
            return F.scaled_dot_product_attention(q, k, v, mask)

    output, found = gradients_of(wanted, call)
    assert type(output.grad_fn).__name__ == "EfficientBackward"
    torch.testing.assert_close((output, found), expected, rtol=1e-4, atol=1e-5)
    assert kernels.biases[0].shape == (2, 4, tokens, tokens)


def test_only_unaligned_masks_are_padded_and_broadcast_dims_stay(emulated):
    kernels = emulated("efficient")
    q, k, v = packed(64)[0]
    mask = torch.randn(1, 1, 64, 64)
    with compress(EXACT):
        F.scaled_dot_product_attention(q, k, v, mask)
        F.scaled_dot_product_attention(q, k, v, mask.mT)
    kept, padded = kernels.biases
    assert kept.data_ptr() == mask.data_ptr()
    assert kept.stride() == (0, 0, 64, 1)
    # As PyTorch does: a row of 64 becomes one of 72.
    assert padded.stride() == (0, 0, 72, 1)
    assert torch.equal(padded[1, 3], mask[0, 0].mT)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_with_packed_operands(emulated, monkeypatch, masked, causal):
    if masked and causal:
        pytest.skip("PyTorch takes one of the two")
    monkeypatch.setattr(attention_cuda, "cudnn_masked_score", lambda: -65504.0)
    (q, k, v), qkv = packed(197)
    mask = mask_of("bool", 197)[1] if masked else None
    options = {"attn_mask": mask, "is_causal": causal}
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients_of([qkv], lambda: F.scaled_dot_product_attention(q, k, v, **options))
    kernels = emulated("cudnn")

    def call():
        with compress(EXACT):
            return F.scaled_dot_product_attention(q, k, v, **options)

    output, found = gradients_of([qkv], call)
    assert type(output.grad_fn).__name__ == "CuDNNBackward"
    torch.testing.assert_close((output, found), expected, rtol=1e-4, atol=1e-5)
    if masked:
        assert kernels.biases[0].dtype == q.dtype
        assert set(kernels.biases[0].unique().tolist()) == {-65504.0, 0.0}


@pytest.mark.parametrize("width", [12, 16])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_flash_pads_head_dims(emulated, width, scale):
    (q, k, v), qkv = packed(33, width=width)
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients_of([qkv], lambda: F.scaled_dot_product_attention(q, k, v, scale=scale))
    emulated("flash")

    def call():
        with compress(EXACT):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)

    output, found = gradients_of([qkv], call)
    assert type(output.grad_fn).__name__ == "FlashCUDABackward"
    torch.testing.assert_close((output, found), expected, rtol=1e-4, atol=1e-5)


def test_a_trained_mask_does_not_go_to_cudnn(monkeypatch):
    # PyTorch's cuDNN attention has no gradient of the mask.
    monkeypatch.setattr(attention, "_backend", lambda *_: attention._CUDNN)
    with FakeTensorMode():
        q, k, v = [
            torch.empty(SHAPE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        ]
        mask = torch.empty(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with compress(Policy(min_bytes=0)):
            output = F.scaled_dot_product_attention(q, k, v, mask)
            assert type(output.grad_fn).__name__ == "UnfusedBackward"
            output = F.scaled_dot_product_attention(q, k, v, mask.detach())
            assert type(output.grad_fn).__name__ == "CuDNNBackward"


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_the_kernel_of_a_call_is_recorded(kernel):
    run = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
    with FakeTensorMode(), attention_backend._Calls() as calls:
        q = torch.empty(SHAPE, device="cuda", dtype=torch.bfloat16)
        run(q, q, q, *(() if kernel == "flash" else (None, True)))
    assert calls.kernel == kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, "bool", "float", "trained"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("value_width", [8, 12])
def test_traced_choice_is_the_choice_of_eager_mode(dtype, mask, dropout, value_width):
    q, k = [torch.randn(2, 2, 16, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
    v = torch.randn(2, 2, 16, value_width, dtype=dtype, requires_grad=True)
    m = None
    if mask is not None:
        m = torch.rand(16, 16) > 0.5 if mask == "bool" else torch.randn(16, 16, dtype=dtype)
        m.requires_grad_(mask == "trained")
    eager = torch._fused_sdp_choice(q, k, v, m, dropout, False)
    described = [
        None if t is None else attention_backend.described(t, t.requires_grad) for t in (q, k, v, m)
    ]
    traced = attention_backend.traced_kernel("cpu", *described, dropout > 0, False)
    assert attention._TRACED[traced] == eager


def test_eager_choice_is_asked_about_training(monkeypatch):
    # Some kernels cannot train: flash on some GPUs above a head dim of 192.
    asked = []
    choose = torch._fused_sdp_choice

    def spy(q, k, v, mask, *rest, **options):
        asked.append([t.requires_grad for t in (q, k, v, mask)])
        return choose(q, k, v, mask, *rest, **options)

    monkeypatch.setattr(torch, "_fused_sdp_choice", spy)
    q, k, v = [torch.randn(2, 2, 16, 8, requires_grad=i != 1) for i in range(3)]
    mask = torch.randn(16, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), compress(EXACT):
        F.scaled_dot_product_attention(q, k, v, mask)
    assert asked == [[True, False, True, True]]


def attend(q, k, v, mask):
    with compress(EXACT):
        return F.scaled_dot_product_attention(q, k, v, mask)


def test_compiled_choice_takes_any_batch_and_a_trained_mask():
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    mask = torch.randn(16, 16, requires_grad=True)
    for batch in (2, 3, 5):
        # The third batch size compiles nothing.
        stance = "fail_on_recompile" if batch == 5 else "default"
        operands = [torch.randn(batch, 2, 16, 8, requires_grad=True) for _ in range(3)]
        with torch.compiler.set_stance(stance), torch.autocast("cpu", torch.bfloat16):
            output = compiled(*operands, mask)
            expected_output = attend(*operands, mask)
        assert torch.equal(output, expected_output)
        grad = torch.randn_like(output)
        found = torch.autograd.grad(output, [*operands, mask], grad)
        expected = torch.autograd.grad(expected_output, [*operands, mask], grad)
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
@pytest.mark.parametrize("tokens", [49, 64, 197])
def test_outputs_and_gradients_on_a_gpu(backend, kind, tokens):
    if kind is not None and backend == "FLASH_ATTENTION":
        pytest.skip("flash attention takes no mask")
    options = {"device": "cuda", "dtype": torch.bfloat16}
    (q, k, v), qkv = packed(tokens, width=64, **options)
    mask = None if kind is None else mask_of(kind, tokens, **options)[1]
    grad = torch.randn(2, 4, tokens, 64, **options)

    def gradients():
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return output, torch.autograd.grad(output, qkv, grad)

    with sdpa_kernel(getattr(SDPBackend, backend)):
        try:
            expected_output, expected = gradients()
        except RuntimeError as reason:
            pytest.skip(f"PyTorch has no such kernel here: {reason}")
        with compress(EXACT):
            output, found = gradients()
    assert torch.equal(output, expected_output)
    # Where the kernel adds atomically its sums differ in their last bits.
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
