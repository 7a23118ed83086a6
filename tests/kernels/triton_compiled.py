"""Compiles the Triton kernels for an H100, without one, through their own launchers, and checks the
assembly: no fused multiply-add where two roundings are specified, no atomics, and memory moved 16
bytes at a time. Run by test_triton_operators.py in a process of its own."""

import os

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mesa_train.kernels import reference
from mesa_train.kernels.triton import bitmask, decode, encode, forward, norm, pair, scale, softmax

compiled = []
run = JITFunction.run


class H100:
    """What the compiler asks of a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel, *args, grid, warmup, **options):
    compiled.append(run(kernel, *args, grid=grid, warmup=True, **options))


def ptx(launcher, *args) -> str:
    """The assembly of all kernels that a call would launch."""
    compiled.clear()
    launcher(*args)
    assert compiled, launcher
    for kernel in compiled:
        assert kernel.asm["cubin"]
    return "\n".join(kernel.asm["ptx"] for kernel in compiled)


def main() -> None:
    driver.set_active(H100())
    JITFunction.run = compile_only
    qkv = torch.randn(64, 3 * 384)
    rows = torch.rand(64)
    for bits in (8, 4, 2):
        for x in (qkv[:, :384], qkv.bfloat16()[:, 384:768]):
            for stochastic in (False, True):
                text = ptx(encode.affine_encode, x, bits, 128, stochastic, 0)
                assert "fma" not in text
                assert "ld.global.v4.b32" in text
                assert f"st.global.v{2 if bits == 2 else 4}.b32" in text
                assert "st.global.b8" not in text
        text = ptx(encode.normalized_encode, qkv[:, :384], rows, rows, bits, 128, False, 0)
        assert "fma" not in text
        coded = reference.affine_encode(qkv[:, :384], bits, 128, False, 0)
        for affine in ((None, None), (qkv[0, :384], qkv[1, :384])):
            text = ptx(decode.affine_decode, *coded, bits, 384, torch.bfloat16, *affine)
            assert "fma" not in text
            assert "st.global.v4.b32" in text
            assert "ld.global.b8" not in text
        for grad in (qkv[:, :384], qkv.bfloat16()[:, :384]):
            args = (grad, *coded, rows, qkv[0, :384], bits, True, grad.dtype)
            assert "atom" not in ptx(norm.norm_backward, *args)
    for kind in reference.ACTIVATIONS:
        text = ptx(decode.activation_decode, *coded, 2, 384, torch.bfloat16, kind)
        assert "st.global.v4.b32" in text
        grad = qkv.bfloat16()[:, :384]
        ptx(decode.activation_backward, grad, *coded, 2, kind)
        ptx(decode.activation_pair, grad, *coded, 2, kind)
        text = ptx(pair.activation_pair_sum, grad, *coded, 2, kind)
        assert "atom" not in text
        assert "st.global.v4.b32" in text
        text = ptx(forward.activation_encode, qkv.bfloat16(), kind, 8, 128, False, 0)
        assert "st.global.v4.b32" in text
    for dtype in (torch.float32, torch.bfloat16):
        args = (qkv.to(dtype)[:, :384], qkv[0, :384], qkv[1, :384], 1e-5, True, torch.bfloat16)
        for stochastic in (False, True):
            text = ptx(forward.norm_encode, *args, 4, 128, stochastic, 0)
            assert "ld.global.v4.b32" in text
            assert "st.global.v4.b32" in text
            scores = qkv.to(dtype)[:, :384]
            text = ptx(softmax.softmax_encode, scores, dtype, 8, 128, stochastic, 0)
            assert "ld.global.v4.b32" in text
            assert "st.global.v4.b32" in text
        text = ptx(scale.scale_backward, qkv[:, :384], qkv[0, :384], torch.bfloat16)
        assert "atom" not in text
        assert "ld.global.v4.b32" in text
        ptx(softmax.softmax_backward, qkv.to(dtype)[:, :384], *coded, 2)
    # Groups that share a byte, and a short last one.
    ptx(encode.affine_encode, qkv[:, :197], 4, 128, True, 0)
    bits = reference.bitmask_positive(qkv)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert "ld.global.v4.b32" in ptx(bitmask.bitmask_positive, qkv.to(dtype))
        ptx(bitmask.bitmask_apply, qkv.to(dtype), bits, 2.0)
    ptx(bitmask.bitmask_encode, qkv > 0)


if __name__ == "__main__":
    main()
