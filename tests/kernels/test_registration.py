"""Schemas, fakes, checks and compilation of every operator."""

import kernel_cases
import pytest
import torch

from mesa_train import kernels
from mesa_train.codecs import bitmask
from mesa_train.codecs.affine import Affine
from mesa_train.kernels import reference, schemas

ops = torch.ops.mesa_train


def samples():
    x, vector = torch.randn(6, 130), torch.rand(6)
    weight = torch.rand(130)
    coded = reference.affine_encode(x, 4, 64, False, 0)
    bits = reference.bitmask_positive(x)
    return {
        "affine_encode": [(x, 4, 64, True, 1), (x.bfloat16().t(), 8, 3, False, 0)],
        "affine_encode_parts": [
            (x[:, :126], 3, 4, 16, True, 1),
            (x.bfloat16(), 2, 8, 64, False, 0),
        ],
        "affine_decode": [(*coded, 4, 130, torch.half), (*coded, 4, 130, torch.float, weight)],
        "normalized_encode": [
            (x, vector, vector, 2, 64, False, 0),
            (x, None, vector, 8, 64, True, 0),
        ],
        "norm_backward": [
            (x, *coded, vector, weight, 4, True, torch.bfloat16),
            (x, *coded, vector, None, 4, False, torch.float),
        ],
        "activation_decode": [(*coded, 4, 130, torch.half, "gelu")],
        "activation_backward": [(x[:, ::1], *coded, 4, "silu")],
        "activation_pair": [(x.bfloat16(), *coded, 4, "gelu")],
        "softmax_backward": [(x, *coded, 4), (x.bfloat16(), *coded, 4)],
        "scale_backward": [(x, weight, torch.bfloat16), (x.bfloat16().t(), vector, torch.half)],
        "cast_like": [(x.t(), x.bfloat16())],
        "bitmask_encode": [(x > 0,), ((x > 0).t(),)],
        "bitmask_positive": [(x,)],
        "bitmask_apply": [(x, bits, 2.0), (x.t(), bits, 1.0)],
    }


@pytest.mark.parametrize("name", [*kernel_cases.OPERATORS, "cast_like"])
def test_opcheck(name):
    kernels.load()
    for args in samples()[name]:
        torch.library.opcheck(getattr(ops, name).default, args)


def test_a_plainly_true_check_is_skipped_and_a_symbolic_one_is_recorded(monkeypatch):
    recorded = []
    monkeypatch.setattr(torch, "_check", lambda condition, _message: recorded.append(condition))
    symbolic = object()  # in the place of a SymBool, which must not be evaluated
    for condition in (True, symbolic, False):
        schemas._check(condition, lambda: "")
    assert recorded == [symbolic, False]


@pytest.mark.parametrize("name", [*kernel_cases.OPERATORS, "cast_like"])
def test_meta_tensors_have_the_same_shapes(name):
    def meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def layout(out):
        out = (out,) if isinstance(out, torch.Tensor) else out
        return [(t.shape, t.stride(), t.dtype) for t in out]

    for args in samples()[name]:
        op = getattr(ops, name)
        assert layout(op(*map(meta, args))) == layout(op(*args))


def everything(x, grad, weight):
    codec = Affine(4, 64, True, 1)
    cols = x.shape[1]
    coded = codec.encode(x)
    normalized = codec.encode_normalized(x, x.mean(1), x.std(1))
    bits = bitmask.encode_positive(x)
    return (
        codec.decode(coded, cols, torch.float32, weight, weight),
        *ops.norm_backward(grad, *normalized, x.std(1), weight, 4, True, torch.float32),
        ops.activation_decode(*coded, 4, cols, torch.float32, "gelu"),
        ops.activation_backward(grad, *coded, 4, "gelu"),
        bitmask.apply(grad, bits, 2.0),
        bitmask.encode(x > 0),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows, cols in ((6, 130), (5, 77)):
        args = torch.randn(rows, cols), torch.randn(rows, cols), torch.randn(cols)
        torch.testing.assert_close(compiled(*args), everything(*args))


def test_a_first_load_inside_a_compiled_function_does_not_break_the_graph(monkeypatch):
    monkeypatch.setattr(kernels, "_loaded", False)
    torch._dynamo.reset()
    codec = Affine()
    compiled = torch.compile(codec.encode, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64)
    assert torch.equal(compiled(x)[0], codec.encode(x)[0])
    assert kernels._loaded


X = torch.randn(4, 64)
CODED = reference.affine_encode(X, 8, 64, False, 0)
REFUSED = [
    ("affine_encode", (X[0], 8, 64, False, 0), "x must be 2-D"),
    ("affine_encode", (X.int(), 8, 64, False, 0), "x must be a floating-point tensor"),
    ("affine_encode", (X, 7, 64, False, 0), r"bits must be one of \(8, 6, 5, 4, 3, 2\), got 7"),
    ("affine_encode", (X, 8, 0, False, 0), "group_size must be at least 1, got 0"),
    ("affine_encode_parts", (X, 3, 8, 64, False, 0), "parts must divide the columns of x, got 3"),
    ("affine_encode_parts", (X, 0, 8, 64, False, 0), "parts must divide the columns of x, got 0"),
    ("normalized_encode", (X, None, X[0], 8, 64, False, 0), "rstd must have 4 elements, got 64"),
    ("normalized_encode", (X, X, X[:, 0], 8, 64, False, 0), "mean must be 1-D"),
    ("affine_decode", (*CODED, 8, 65, torch.float), "codes must have 65 bytes a row"),
    ("affine_decode", (CODED[0].int(), CODED[1], 8, 64, torch.float), "codes must be torch.uint8"),
    ("affine_decode", (CODED[0], X, 8, 64, torch.float), "scales must be torch.bfloat16"),
    ("affine_decode", (*CODED, 8, 64, torch.float, X[0, :3]), "weight must have 64 elements"),
    ("norm_backward", (X[:2], *CODED, X[:, 0], None, 8, True, torch.float), "must have 2 rows"),
    ("activation_decode", (*CODED, 8, 64, torch.float, "gulp"), r"kind must be one of .* 'gulp'"),
    ("activation_backward", (X, *CODED, 8, "gulp"), r"kind must be one of \('gelu', .* 'gulp'"),
    ("softmax_backward", (X[:2], *CODED, 8), "must have 2 rows"),
    ("scale_backward", (X, X[:, 0], torch.half), "scale must have 64 elements, got 4"),
    ("bitmask_encode", (X,), "mask must be torch.bool"),
    ("bitmask_apply", (X, CODED[0][0, :5], 1.0), "bits must have 32 elements"),
]


@pytest.mark.parametrize(("name", "args", "message"), REFUSED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refuses(name, args, message, device):
    kernels.load()
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*args)
