"""The Triton kernels: code for code with the reference, how tiles are cut, and registration."""

import contextlib
import logging
import subprocess
import sys

import kernel_cases
import pytest
import torch
import triton_interpreter
from limits import HUNG_S

from mesa_train import kernels
from mesa_train.kernels import packing, reference, schemas
from mesa_train.kernels.triton import load as triton_load

# (rows, cols, group_size): empty, single, groups that share a byte, a short last group, one group a
# row, a tile of one unit, and lengths that ViTs have.
SHAPES = (
    *((0, 5, 4), (5, 0, 4), (1, 1, 1), (9, 1, 64), (12, 33, 7), (40, 64, 3), (20, 130, 64)),
    *((6, 197, 128), (5, 257, 1000), (3, 5000, 5000), (9, 384, 128), (9, 192, 128), (17, 768, 128)),
)


def test_every_kernel_is_registered_and_tested():
    tested = [*triton_interpreter.MODULES.items(), *triton_interpreter.APART.items()]
    expected = {name: module for module, names in tested for name in names}
    assert expected == triton_load.OPERATORS


@pytest.mark.slow
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("rows", "cols", "group_size"), SHAPES)
def test_codes_equal_the_reference(triton, rows, cols, group_size, stochastic):
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        views = (
            kernel_cases.special(rows, cols, dtype),
            kernel_cases.special(rows, 3 * cols, dtype)[:, cols : 2 * cols],
            kernel_cases.special(rows, 2 * cols, dtype)[:, ::2],
            kernel_cases.special(cols, rows, dtype).t(),
        )
        for bits in schemas.BITS:
            # Every dtype and width meets every view, in turn.
            view = views[(number + bits) % len(views)]
            actual = triton.affine_encode(view, bits, group_size, stochastic, -7)
            expected = reference.affine_encode(view, bits, group_size, stochastic, -7)
            assert torch.equal(actual[0], expected[0])
            assert torch.equal(actual[1].view(torch.int16), expected[1].view(torch.int16))


@pytest.mark.parametrize("bits", schemas.BITS)
@pytest.mark.parametrize(("rows", "cols", "group_size"), SHAPES)
def test_values_equal_the_reference(triton, rows, cols, group_size, bits):
    coded = reference.affine_encode(
        kernel_cases.special(rows, cols, torch.float32), bits, group_size, False, 0
    )
    weight, bias = torch.randn(cols).to(torch.bfloat16), torch.randn(cols)
    for dtype, *affine in (
        (torch.float32, None, None),
        (torch.bfloat16, weight, bias),
        (torch.float16, weight, None),
        (torch.float64, None, bias),
    ):
        for dither in (None, -7):
            args = *coded, bits, cols, dtype, *affine, dither
            actual, expected = triton.affine_decode(*args), reference.affine_decode(*args)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_operands_inside_a_packed_projection_are_read_in_place(triton):
    packed = torch.randn(2 * 5, 3 * 96)
    for part in packed.split(96, 1):
        actual = triton.affine_encode(part, 4, 32, True, 0)
        assert torch.equal(actual[0], reference.affine_encode(part, 4, 32, True, 0)[0])


def test_norm_gradients_have_the_same_bits_again(triton):
    x = torch.randn(300, 96)
    coded = reference.affine_encode(x, 8, 32, False, 0)
    args = (torch.randn(300, 96), *coded, torch.rand(300), torch.randn(96), 8, True, torch.float32)
    first, again = triton.norm_backward(*args), triton.norm_backward(*args)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_group_too_long_for_a_tile_falls_back(triton):
    x = torch.randn(2, 40000)
    actual = triton.affine_encode(x, 8, 40000, False, 0)
    assert torch.equal(actual[0], reference.affine_encode(x, 8, 40000, False, 0)[0])
    value = triton.affine_decode(*actual, 8, 40000, torch.float32)
    assert torch.equal(value, reference.affine_decode(*actual, 8, 40000, torch.float32))


def test_scales_of_another_matrix_are_refused(triton):
    codes, scales = reference.affine_encode(torch.randn(4, 64), 8, 64, False, 0)
    with pytest.raises(RuntimeError, match="as many groups as cols=64"):
        triton.affine_decode(codes, scales.repeat(1, 63, 1), 8, 64, torch.float32)


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
@pytest.mark.parametrize("cols", [1, 7, 64, 197, 1000])
@pytest.mark.parametrize("bits", schemas.BITS)
def test_units_start_on_whole_bytes_and_cover_the_row(triton, cols, groups, bits):
    from mesa_train.kernels.triton.tiles import tiles

    size = -(-cols // min(groups, cols))
    groups = -(-cols // size)
    cut = tiles(10, cols, groups, bits)
    units, per_row, *_ = cut.numbers
    _, joined, ragged, height, width = cut.constants
    assert units == 10 * per_row
    assert per_row * joined >= groups > (per_row - 1) * joined
    assert per_row == 1 or joined * size * min(packing.planes(bits)) % 8 == 0
    assert width >= joined * size
    assert ragged == (cols % (joined * size) != 0)
    assert cut.grid[0] * height >= units


# --- registration ---


def test_load_registers_for_gpus_and_does_not_import_triton():
    script = """
import sys, torch
from mesa_train import kernels
kernels.load()
has = torch._C._dispatch_has_kernel_for_dispatch_key
for key in ("CUDA", "XPU"):
    assert has("mesa_train::affine_encode", key), key
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=HUNG_S)
    assert done.returncode == 0


def test_without_triton_the_reference_runs_after_one_warning(monkeypatch, caplog):
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(triton_load.importlib, "import_module", absent)
    triton_load._obstacle.cache_clear()
    x = torch.randn(4, 64)
    try:
        with caplog.at_level(logging.WARNING):
            code = 8, 64, False, 0
            for name, args in (
                ("affine_encode", (x, *code)),
                ("activation_encode", (x, "gelu", *code)),
                ("bitmask_positive", (x,)),
            ):
                body = triton_load._body(name, torch.device("cpu"))
                out = body(*args)
        assert torch.equal(out, reference.bitmask_positive(x))
        with pytest.raises(RuntimeError, match="x must be a floating-point tensor"):
            body(x.int())
    finally:
        triton_load._obstacle.cache_clear()
    assert len(caplog.records) == 1
    assert "pip install triton" in caplog.text


@pytest.fixture
def turing(triton, monkeypatch):
    """A device with compute capability 7.5."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.accelerator, "device_index", contextlib.nullcontext)
    triton_load._obstacle.cache_clear()
    yield torch.device("cuda:0")
    triton_load._obstacle.cache_clear()


def test_an_old_gpu_has_the_kernels_if_triton_compiles_one_for_it(turing, monkeypatch, caplog):
    from mesa_train.kernels.triton import encode

    tried = []
    monkeypatch.setattr(encode, "compile_one", lambda: tried.append(True))
    with caplog.at_level(logging.WARNING):
        for name in ("affine_encode", "norm_backward"):
            body = triton_load._body(name, turing)
            assert body.__module__.startswith("mesa_train.kernels.triton.")
            assert body.__name__ == name
    assert tried == [True]
    assert not caplog.records


def test_an_old_gpu_has_the_reference_if_triton_compiles_nothing_for_it(
    turing, monkeypatch, caplog
):
    from mesa_train.kernels.triton import encode

    def fail() -> None:
        raise RuntimeError("no such target: sm_75\n" + "ptx\n" * 1000)

    monkeypatch.setattr(encode, "compile_one", fail)
    x = torch.randn(4, 64)
    with caplog.at_level(logging.WARNING):
        out = [triton_load._body("bitmask_positive", turing)(x) for _ in range(2)]
    assert torch.equal(out[0], reference.bitmask_positive(x))
    (record,) = caplog.records
    message = record.getMessage()
    assert "compute capability 7.5, and Triton does not compile for it: no such target" in message
    assert "ptx" not in message
    assert "pip install" not in message


def test_a_supported_gpu_is_not_tried(turing, monkeypatch):
    from mesa_train.kernels.triton import encode

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(encode, "compile_one", None)
    assert triton_load._obstacle(turing) is None


# --- for a machine with a GPU ---


@pytest.mark.gpu
def test_a_captured_graph_replays():
    kernels.load()
    ops = torch.ops.mesa_train
    x = torch.randn(64, 384, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    rstd = torch.rand(64, device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        coded = ops.affine_encode(x, 4, 128, True, 0)
        y = ops.activation_decode(*coded, 4, 384, torch.bfloat16, "gelu")
        return y, *ops.norm_backward(grad, *coded, rstd, None, 4, True, torch.bfloat16)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
