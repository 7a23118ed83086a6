"""What the tests of stashes share: what a call keeps, and gradients with and without codes."""

import pytest
import torch

from mesa_train import Policy, compress
from mesa_train.codecs.affine import Affine
from mesa_train.engine import native
from mesa_train.engine.intercept import CompressionMode

ROWS, COLS = 64, 96

LOSSLESS = Policy(bits=32, min_bytes=0)


class Kept:
    """Counts the storages that the graph keeps, each once, parameters apart."""

    def __init__(self, *parameters):
        self.known = {p.untyped_storage()._cdata for p in parameters}
        self.storages = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self):
        return sum(s.nbytes() for s in self.storages.values())


def codes(rows, cols, bits=8):
    return Affine(bits, 128).bytes(rows, cols)


def activation(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_().mul(1.0)


def kept(function, *arguments, parameters=(), policy=None):
    with Kept(*parameters) as counter, compress(policy or Policy(min_bytes=0)):
        output = function(*arguments)
    return counter.bytes, output


def both(function, *shapes, policy=LOSSLESS, dtype=torch.float64):
    """(gradients in plain PyTorch, gradients under the policy) with respect to leaves of these shapes."""
    results = []
    for active in (False, True):
        torch.manual_seed(0)
        leaves = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
        if active:
            with compress(policy):
                output = function(*leaves)
        else:
            output = function(*leaves)
        results.append(torch.autograd.grad(output.square().sum(), leaves))
    return results


def assert_equal(plain, ours, bound=1e-10):
    for p, o in zip(plain, ours, strict=True):
        assert (p - o).norm() <= bound * p.norm()


def implementation(kind):
    """The body of a fixture: the rows run in C++ if `kind` is "native", in Python otherwise."""
    native.prepare(CompressionMode)
    if kind == "native":
        if native.extension is None:
            pytest.skip("no compiler, or MESA_TRAIN_NATIVE=0")
        yield
    else:
        with native.python_rows(CompressionMode):
            yield
