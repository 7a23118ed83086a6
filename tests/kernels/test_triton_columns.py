"""The grid of the kernels that sum columns: programs of several multiprocessors, from registers."""

from types import SimpleNamespace

import pytest
import torch
import triton_interpreter

from mesa_train.kernels import reference

HOPPER = SimpleNamespace(
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    shared_memory_per_multiprocessor=233472,
    multi_processor_count=132,
)


class Kernel:
    """A compiled kernel. Like Triton's, it counts its registers when it is loaded."""

    def __init__(self, registers, shared=0):
        self.n_regs = None
        self.registers, self.metadata = registers, SimpleNamespace(shared=shared)

    @property
    def run(self):
        self.n_regs = self.registers


@pytest.fixture
def columns(triton):
    from mesa_train.kernels.triton import columns

    return columns


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "expected"),
    [
        (64, 0, 4, 8),
        (128, 0, 4, 4),
        (129, 0, 4, 3),
        (136, 0, 4, 3),
        (168, 0, 4, 3),
        (169, 0, 4, 2),  # a thread gets 176
        (205, 0, 4, 2),
        (255, 0, 32, 1),
        (24, 0, 4, 16),  # 2048 threads
        (24, 100 * 1024, 4, 2),
    ],
)
def test_programs_that_fit_on_a_multiprocessor(columns, registers, shared, num_warps, expected):
    assert columns.fitting(Kernel(registers, shared), num_warps, HOPPER) == expected


def test_128_registers_are_assumed_of_a_kernel_that_does_not_count_them(columns):
    for kernel in (None, object()):
        assert columns.fitting(kernel, 4, HOPPER) == 4
        assert columns.fitting(kernel, 4, object()) == 4


@pytest.mark.parametrize(("registers", "expected"), [(40, 4), (136, 3), (205, 2)])
def test_the_grid_follows_the_compiled_kernel(columns, monkeypatch, registers, expected):
    asked = []

    def compiled(*arguments):
        asked.append(arguments)
        return Kernel(registers)

    monkeypatch.setattr(columns, "compiled", compiled)
    monkeypatch.setattr(columns, "_properties", lambda _: HOPPER)
    monkeypatch.setattr(torch.version, "hip", None)
    columns.multiprocessors.cache_clear()
    found = columns.programs_at_once("kernel", 4, (1, 2), torch.device("cuda:0"))
    columns.multiprocessors.cache_clear()
    assert found == expected * 132
    assert asked == [("kernel", 4, (1, 2))]


def test_other_devices_have_a_fixed_number(columns, monkeypatch):
    monkeypatch.setattr(columns, "multiprocessors", lambda _: 7)
    assert columns.programs_at_once("kernel", 4, (), torch.device("cpu")) == 4 * 7
    assert columns.programs_at_once("kernel", 4, (), torch.device("xpu"), 8) == 8 * 7


@pytest.mark.parametrize("rows", [1, 5, 63, 200, 1111])
@pytest.mark.parametrize("count", [2, 3, 11])
def test_several_multiprocessors(columns, monkeypatch, rows, count):
    """Every row is in one part, however many programs share the rows, and the last ones are idle."""
    monkeypatch.setattr(columns, "multiprocessors", lambda _: count)
    ours = {**vars(triton_interpreter.bodies()), **vars(triton_interpreter.apart())}
    x, grad, weight, rstd = (
        torch.randn(rows, 96),
        torch.randn(rows, 96),
        torch.randn(96),
        torch.rand(rows),
    )
    coded = reference.affine_encode(x, 8, 32, False, 0)
    args = (grad, *coded, rstd, weight, 8, True, torch.float32)
    norm = ours["norm_backward"].__wrapped__(*args)(*args)
    scale = ours["scale_backward"].__wrapped__(grad, weight, torch.float32)
    pair = ours["activation_pair_sum"].__wrapped__(grad, *coded, 8, "relu")
    scale, pair = scale(grad, weight), pair(grad, *coded)
    for actual, expected in (
        (norm, reference.norm_backward(*args)),
        (scale, reference.scale_backward(grad, weight, torch.float32)),
        (pair[:2], reference.activation_pair(grad, *coded, 8, "relu")),
        (pair[2:], (pair[0].sum(0),)),
    ):
        for a, e in zip(actual, expected, strict=True):
            # Sums of up to 1111 float32s in another order.
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_programs_cover_all_tiles(columns):
    for count in (1, 2, 3, 7, 8, 100, 12345):
        for most in (1, 4, 28, 528):
            programs, share = columns.split(count, most)
            assert programs <= most
            assert programs * share >= count > (programs - 1) * share
