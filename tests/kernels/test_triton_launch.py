"""What a call site of a Triton operator decides once, and what it decides at every call."""

import gc
import weakref

import pytest
import torch
import triton_interpreter

from mesa_train.kernels import reference
from mesa_train.kernels.triton import launch

X = torch.arange(24.0).view(4, 6)


def counted(free=0):
    """An operator, and the list of arguments that it was prepared with."""
    prepared = []

    @launch.per_site(free)
    def operator(*args):
        prepared.append(args)
        return lambda *now: now

    return operator, prepared


def test_a_site_is_prepared_once():
    operator, prepared = counted()
    for _ in range(3):
        assert operator(X, None, 8, torch.float32) == (X, None, 8, torch.float32)
        operator(torch.empty(4, 6), None, 8, torch.float32)
    assert len(prepared) == 1


@pytest.mark.parametrize(
    "other",
    [
        (torch.empty(6, 4), None, 8),
        (torch.empty(6, 4).t(), None, 8),
        (torch.empty(4, 6, dtype=torch.int32), None, 8),
        (torch.empty(4, 6, device="meta"), None, 8),
        (torch.empty(25)[1:].view(4, 6), None, 8),
        (X, X, 8),
        (X, None, 4),
        (X, None),
    ],
    ids=["shape", "strides", "dtype", "device", "alignment", "tensor", "number", "count"],
)
def test_another_property_is_another_site(other):
    operator, prepared = counted()
    operator(X, None, 8)
    operator(*other)
    assert len(prepared) == 2


def test_free_arguments_are_not_part_of_the_site():
    operator, prepared = counted(free=1)
    assert [operator(X, seed)[1] for seed in (1, 2, 3)] == [1, 2, 3]
    assert len(prepared) == 1


def test_an_error_is_raised_at_every_call():
    calls = []

    @launch.per_site()
    def operator(x):
        calls.append(x)
        raise RuntimeError("refused")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="refused"):
            operator(X)
    assert len(calls) == 2


def test_the_oldest_sites_are_dropped(monkeypatch):
    """Multi-scale training calls an operator with ever new shapes."""
    monkeypatch.setattr(launch, "SITES", 4)
    alive = weakref.WeakSet()

    @launch.per_site()
    def operator(x):
        def call(x):
            return x.shape[0]

        alive.add(call)
        return call

    assert [operator(torch.empty(n)) for n in range(100)] == list(range(100))
    gc.collect()
    assert len(alive) == 4
    assert operator(torch.empty(0)) == 0


def test_the_first_launch_is_kept_for_the_next(monkeypatch):
    """Arguments arrive in the kernel's order: what varies, then what is bound."""
    calls = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: calls.append((grid, args))

    def first_run(kernel, grid, num_warps, arguments):
        calls.append((kernel, grid, num_warps, arguments))
        return Compiled()

    monkeypatch.setattr(launch, "first_run", first_run)
    run = launch.Launch("kernel", (7,), 4, (8, "gelu"))
    for seed in (1, 2):
        run(None, seed)
    assert calls == [
        ("kernel", (7, 1, 1), 4, (None, 1, 8, "gelu")),
        ((7, 1, 1), (None, 2, 8, "gelu")),
    ]


def test_outputs_are_new_tensors_with_the_same_properties():
    like = torch.empty(4, 6).t(), torch.empty(3, dtype=torch.uint8, device="meta")
    make = launch.outputs(*like)
    first, again = make(), make()
    for out in (first, again):
        for a, b in zip(out, like, strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (
                b.shape,
                b.stride(),
                b.dtype,
                b.device,
            )
    assert first[0].data_ptr() != again[0].data_ptr()


# --- the operators ---


def arguments():
    """Arguments for each operator, in new tensors."""
    x, vector = torch.randn(6, 48), torch.randn(48)
    coded = reference.affine_encode(x, 4, 16, False, 0)
    rows, code, grad = torch.rand(6), (4, 16, True), x.clone()
    return {
        "affine_encode": (x, *code, 1),
        "normalized_encode": (x, rows, rows.clone(), *code, 1),
        "affine_decode": (*coded, 4, 48, torch.half, vector, vector.clone()),
        "activation_decode": (*coded, 4, 48, torch.half, "gelu"),
        "activation_backward": (grad, *coded, 4, "gelu"),
        "activation_pair": (grad, *coded, 4, "gelu"),
        "activation_pair_sum": (grad, *coded, 4, "gelu"),
        "norm_backward": (grad, *coded, rows, vector, 4, True, torch.half),
        "softmax_backward": (grad, *coded, 4),
        "scale_backward": (grad, vector, torch.half),
        "bitmask_encode": (x > 0,),
        "bitmask_positive": (x,),
        "bitmask_apply": (grad.t(), reference.bitmask_positive(x), 2.0),
        "norm_encode": (x, vector, None, 1e-5, True, torch.half, *code, 1),
        "activation_encode": (x, "gelu", *code, 1),
        "softmax_encode": (x, torch.half, *code, 1),
    }


@pytest.fixture
def kernels(triton):
    return {**vars(triton), **vars(triton_interpreter.apart())}


def test_every_operator_has_arguments_here(kernels):
    assert set(arguments()) == set(kernels)


@pytest.mark.parametrize("name", arguments())
def test_a_second_call_reads_its_own_tensors_and_the_first_ones_are_freed(kernels, name):
    first, second = (arguments()[name] for _ in range(2))
    kept = [weakref.ref(t) for t in first if isinstance(t, torch.Tensor)]
    out = kernels[name](*first)
    outs = [weakref.ref(t) for t in (out if isinstance(out, tuple) else (out,))]
    del first, out
    gc.collect()
    assert not any(tensor() is not None for tensor in (*kept, *outs))
    again = kernels[name](*second)
    fresh = kernels[name].__wrapped__(*second)(*second)
    as_tuple = again if isinstance(again, tuple) else (again,)
    for a, b in zip(as_tuple, fresh if isinstance(fresh, tuple) else (fresh,), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_every_call_has_its_own_seed_and_factor(triton):
    x = torch.randn(9, 48)
    for seed in (0, 1, -7, 2**40 + 3):
        actual = triton.affine_encode(x, 4, 16, True, seed)
        assert torch.equal(actual[0], reference.affine_encode(x, 4, 16, True, seed)[0])
    bits = reference.bitmask_positive(x)
    for factor in (1.0, 2.0, 0.0, -3.0):
        actual = triton.bitmask_apply(x, bits, factor)
        assert torch.equal(actual, reference.bitmask_apply(x, bits, factor))
