"""The fused attention kernels of a GPU against their schemas, on tensors without data: each recorder
calls its forward and its backward with arguments that PyTorch takes, and no GPU is needed. Where
there is one, their gradients are compared with PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from mesa_train import Policy, compress
from mesa_train.ops import attention

SHAPE = (2, 4, 64, 32)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_gradients_on_a_gpu(backend, masked):
    if masked and backend == "FLASH_ATTENTION":
        pytest.skip("flash attention takes no mask")
    inputs = [
        torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    mask = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16) if masked else None
    grad = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16)

    def gradients():
        output = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
        return output, torch.autograd.grad(output, inputs, grad)

    with sdpa_kernel(getattr(SDPBackend, backend)):
        expected_output, expected = gradients()
        with compress(Policy(bits=32, min_bytes=0)):
            output, found = gradients()
    assert torch.equal(output, expected_output)
    # Where the kernel adds atomically its sums differ in their last bits.
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
