"""Compiles the Triton kernels for an NVIDIA GPU, without one, through their own launchers.

    python tests/kernels/triton_compiled.py 90          each operator once
    python tests/kernels/triton_compiled.py 90 --all    more bits, dtypes and strides

Each operator: no spills, at most `REGISTERS` registers, and memory moved 16 bytes at a time. With
--all also: no fused multiply-add where two roundings are specified, and no atomics. The exit status is
`NO_TARGET` if the assembler of the installed Triton does not have the GPU; the last line of the
output has the reason. test_triton_compiled.py runs this file in a process for each GPU.
"""
# ruff: noqa: T201 (a program of its own)

import os

os.environ.pop("TRITON_INTERPRET", None)

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mesa_train.kernels import reference
from mesa_train.kernels.triton import bitmask, decode, encode, forward, norm, pair, scale, softmax

NO_TARGET = 77
# The most registers of a thread, by operator: 168 for three programs of four warps on a
# multiprocessor. Other operators have at most 96, for five programs.
REGISTERS = {
    "activation_pair": 136,
    "activation_pair_sum": 168,
    "norm_backward": 168,
}

compiled = []
run = JITFunction.run


class Device:
    """What the compiler asks of a device.

    Args:
        capability: compute capability times ten.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

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


def usage(kernel) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack and local memory) of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    registers, stack, local = map(int, found)
    return registers, stack + local


def operators() -> Iterator[tuple[str, object, tuple[object, ...]]]:
    """Each operator once, with arguments as in the training of a ViT: (name, launcher, arguments)."""
    # The column sums have loops over tiles only if there are more tiles than programs.
    qkv, rows, weight = torch.randn(256, 3 * 768), torch.rand(256), torch.randn(768)
    x, half = qkv[:, 768:1536], qkv.bfloat16()[:, :768]
    coded = {bits: reference.affine_encode(x, bits, 128, False, 0) for bits in (8, 6, 5, 4, 2)}
    bf16 = torch.bfloat16
    yield "affine_encode", encode.affine_encode, (half, 5, 128, True, 0)
    yield "affine_encode", encode.affine_encode, (half, 6, 128, True, 0)
    for bits in (5, 4):
        args = *coded[bits], bits, 768, bf16, weight, weight, 0
        yield "affine_decode", decode.affine_decode, args
    yield "activation_pair_sum", pair.activation_pair_sum, (half, *coded[5], 5, "gelu")
    args = half, *coded[5], rows, weight, 5, True, bf16, 0
    yield "norm_backward", norm.norm_backward, args
    yield "softmax_backward", softmax.softmax_backward, (half, *coded[6], 6, 0)
    yield "affine_encode", encode.affine_encode, (half, 8, 128, False, 0)
    yield "affine_encode", encode.affine_encode, (half, 4, 128, True, 0)
    yield "normalized_encode", encode.normalized_encode, (x, rows, rows, 8, 128, False, 0)
    yield "affine_decode", decode.affine_decode, (*coded[8], 8, 768, bf16, weight, weight)
    yield "activation_decode", decode.activation_decode, (*coded[4], 4, 768, bf16, "gelu")
    yield "activation_backward", decode.activation_backward, (half, *coded[4], 4, "gelu")
    yield "activation_pair", decode.activation_pair, (half, *coded[2], 2, "gelu")
    yield "activation_pair", decode.activation_pair, (half, *coded[5], 5, "gelu")
    yield "activation_pair_sum", pair.activation_pair_sum, (half, *coded[8], 8, "gelu")
    for bits in (8, 2):
        args = (half, *coded[bits], rows, weight, bits, True, bf16)
        yield "norm_backward", norm.norm_backward, args
    short = reference.affine_encode(x[:, :384], 2, 128, False, 0)
    args = (half[:, :384], *short, rows, weight[:384], 2, True, torch.float32)
    yield "norm_backward", norm.norm_backward, args
    yield "softmax_backward", softmax.softmax_backward, (half, *coded[8], 8)
    yield "scale_backward", scale.scale_backward, (x, weight, bf16)
    code = 8, 128, False, 0
    yield "norm_encode", forward.norm_encode, (x, weight, weight, 1e-5, True, bf16, *code)
    yield "activation_encode", forward.activation_encode, (half, "gelu", *code)
    yield "softmax_encode", softmax.softmax_encode, (half, bf16, *code)
    yield "bitmask_positive", bitmask.bitmask_positive, (half,)
    yield "bitmask_encode", bitmask.bitmask_encode, (half > 0,)
    yield "bitmask_apply", bitmask.bitmask_apply, (half, reference.bitmask_positive(half), 2.0)


# Operators whose results are smaller than 16 bytes a thread.
NARROW = {"bitmask_positive", "bitmask_encode"}


def check_resources() -> None:
    for name, launcher, args in operators():
        text = ptx(launcher, *args)
        found = [usage(kernel) for kernel in compiled]
        print(name, found)
        assert all(spilled == 0 for _, spilled in found), f"{name} spills: {found}"
        most = max(registers for registers, _ in found)
        assert most <= REGISTERS.get(name, 96), f"{name} has {most} registers"
        assert re.search(r"ld\.global\.v4\.b32", text), f"{name} loads in small pieces"
        if name not in NARROW:
            assert re.search(r"st\.global\.v4\.b32", text), f"{name} stores in small pieces"
            assert not re.search(r"global\.b8", text) or name == "bitmask_apply"


def check_rounding_and_vectors() -> None:
    """All kernels with many combinations of bits, dtypes and strides."""
    qkv = torch.randn(64, 3 * 384)
    rows = torch.rand(64)
    for bits in (8, 6, 5, 4, 3, 2):
        for x in (qkv[:, :384], qkv.bfloat16()[:, 384:768]):
            for stochastic in (False, True):
                text = ptx(encode.affine_encode, x, bits, 128, stochastic, 0)
                assert "fma" not in text
                assert "ld.global.v4.b32" in text
                assert f"st.global.v{2 if bits in (3, 2) else 4}.b32" in text
                assert "st.global.b8" not in text
        text = ptx(encode.normalized_encode, qkv[:, :384], rows, rows, bits, 128, False, 0)
        assert "fma" not in text
        coded = reference.affine_encode(qkv[:, :384], bits, 128, False, 0)
        for affine in ((None, None), (qkv[0, :384], qkv[1, :384]), (None, None, 0)):
            text = ptx(decode.affine_decode, *coded, bits, 384, torch.bfloat16, *affine)
            assert "fma" not in text
            assert "st.global.v4.b32" in text
            assert "ld.global.b8" not in text
        for grad in (qkv[:, :384], qkv.bfloat16()[:, :384]):
            args = (grad, *coded, rows, qkv[0, :384], bits, True, grad.dtype)
            assert "atom" not in ptx(norm.norm_backward, *args)
    grad = qkv.bfloat16()[:, :384]
    for kind in reference.ACTIVATIONS:
        # The pair has the code of the other kernels of an activation: its value and its slope.
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


def main(capability: int, everything: bool) -> None:
    driver.set_active(Device(capability))
    try:
        encode.compile_one()
    except Exception as error:
        if "gpu-name" not in str(error):  # The assembler has the GPU.
            raise
        line = next(text for text in str(error).splitlines() if "gpu-name" in text)
        print(f"compute capability {capability / 10}: {line}")
        sys.exit(NO_TARGET)
    JITFunction.run = compile_only
    check_resources()
    if everything:
        check_rounding_and_vectors()


if __name__ == "__main__":
    main(int(sys.argv[1]), "--all" in sys.argv[2:])
