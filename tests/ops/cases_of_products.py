"""Cases of matrix products and of products element by element."""

import torch
import torch.nn.functional as F
from operator_case import Case, activation, constant, parameter


def _linear():
    for dims, shape in enumerate([(9,), (3, 9), (2, 3, 9), (2, 3, 2, 9)], 1):
        yield Case(
            f"linear {dims}-D", F.linear, (activation(*shape), parameter(5, 9), parameter(5))
        )
    yield Case("linear without bias", F.linear, (activation(4, 9), parameter(5, 9)))
    yield Case(
        "linear, weight by keyword",
        lambda x, w: F.linear(input=x, weight=w),
        (activation(4, 9), parameter(5, 9)),
    )
    yield Case(
        "linear wider than a group", F.linear, (activation(3, 200), parameter(5, 200), parameter(5))
    )
    yield Case("linear of a constant", F.linear, (constant(4, 9), parameter(5, 9), parameter(5)))
    yield Case("linear by a constant", F.linear, (activation(4, 9), constant(5, 9), constant(5)))
    yield Case(
        "linear with only a bias trained", F.linear, (constant(4, 9), constant(5, 9), parameter(5))
    )
    yield Case(
        "linear with an activation as weight", F.linear, (activation(4, 9), activation(5, 9))
    )


def _matmul():
    yield Case("addmm", torch.addmm, (parameter(6), activation(4, 5), parameter(5, 6)))
    yield Case(
        "addmm beta alpha",
        lambda b, x, y: b.addmm(x, y, beta=0.5, alpha=2.0),
        (activation(4, 6), activation(4, 5), activation(5, 6)),
    )
    yield Case(
        "addmm by keyword",
        lambda b, x, y: torch.addmm(b, mat1=x, mat2=y),
        (parameter(6), activation(4, 5), parameter(5, 6)),
        fallback=True,
    )
    yield Case(
        "baddbmm", torch.baddbmm, (activation(2, 4, 6), activation(2, 4, 5), activation(2, 5, 6))
    )
    yield Case(
        "baddbmm beta alpha, broadcast",
        lambda b, x, y: torch.baddbmm(b, x, y, beta=0.25, alpha=3),
        (parameter(1, 1, 6), activation(2, 4, 5), activation(2, 5, 6)),
    )
    yield Case("matmul 2-D 2-D", torch.matmul, (activation(4, 5), activation(5, 6)))
    yield Case("matmul N-D 2-D", torch.matmul, (activation(2, 3, 4, 5), activation(5, 6)))
    yield Case("matmul 2-D N-D", torch.matmul, (activation(4, 5), activation(3, 5, 6)))
    yield Case("matmul N-D N-D", torch.matmul, (activation(2, 3, 4, 5), activation(2, 3, 5, 6)))
    yield Case(
        "matmul broadcasting batch", torch.matmul, (activation(2, 1, 4, 5), activation(3, 5, 6))
    )
    yield Case("matmul vector", torch.matmul, (activation(4, 5), activation(5)), fallback=True)
    yield Case(
        "matmul by keyword",
        lambda x, y: torch.matmul(input=x, other=y),
        (activation(4, 5), activation(5, 6)),
    )
    yield Case("matmul with itself", lambda x: x @ x.mT, (activation(2, 4, 5),))
    yield Case("@", lambda x, y: x @ y, (activation(2, 4, 5), parameter(5, 6)))
    yield Case("@ of a constant", lambda x, y: x @ y, (constant(2, 4, 5), activation(2, 5, 6)))
    yield Case(
        "__rmatmul__", lambda x, y: y.__rmatmul__(x), (activation(2, 4, 5), activation(2, 5, 6))
    )
    yield Case("bmm", torch.bmm, (activation(2, 4, 5), activation(2, 5, 6)))
    yield Case(
        "bmm by keyword",
        lambda x, y: torch.bmm(x, mat2=y),
        (activation(2, 4, 5), activation(2, 5, 6)),
        fallback=True,
    )
    yield Case("Tensor.bmm", lambda x, y: x.bmm(y), (activation(2, 4, 5), activation(2, 5, 6)))
    yield Case("mm", torch.mm, (activation(4, 5), activation(5, 6)))
    for equation, left, right in [
        ("bhnd,bhmd->bhnm", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("bnc,hc->bhn", (2, 4, 5), (3, 5)),
        ("ij,kj->ikj", (3, 5), (2, 5)),
        ("ab,cd->abcd", (2, 3), (2, 2)),
        ("bnc , cd -> bnd", (2, 4, 5), (5, 3)),
    ]:
        yield Case(
            f"einsum {equation}",
            lambda x, y, e=equation: torch.einsum(e, x, y),
            (activation(*left), activation(*right)),
        )
    for equation, left, right in [
        ("ij,kl->ik", (3, 5), (2, 4)),  # an index is summed over that the other does not have
        ("...i,ij->...j", (2, 3, 4), (4, 5)),
        ("ii,ij->j", (4, 4), (4, 5)),
        ("ij,jk", (3, 4), (4, 5)),
        ("ij,ij->ij", (3, 4), (1, 4)),  # broadcasting
    ]:
        yield Case(
            f"einsum {equation} (fallback)",
            lambda x, y, e=equation: torch.einsum(e, x, y),
            (activation(*left), activation(*right)),
            fallback=True,
        )
    yield Case(
        "einsum of a list",
        lambda x, y: torch.einsum("ij,jk->ik", [x, y]),
        (activation(3, 4), activation(4, 5)),
    )
    yield Case(
        "einsum of three",
        lambda x, y, z: torch.einsum("ij,jk,kl->il", x, y, z),
        (activation(3, 4), activation(4, 5), activation(5, 2)),
        fallback=True,
    )


def _products():
    weights = (activation(2, 4, 9), parameter(6, 9), parameter(6), parameter(6))
    yield Case("layer scale", lambda x, w, b, s: F.linear(x, w, b) * s, weights)
    yield Case("layer scale from the left", lambda x, w, b, s: s * F.linear(x, w, b), weights)
    yield Case("layer scale in place", lambda x, w, b, s: F.linear(x, w, b).mul_(s), weights)
    yield Case("layer scale in place, *=", lambda x, w, b, s: _imul(F.linear(x, w, b), s), weights)
    yield Case(
        "layer scale without bias",
        lambda x, w, s: F.linear(x, w) * s,
        (activation(2, 4, 9), parameter(6, 9), parameter(6)),
    )
    yield Case(
        "layer scale of a constant's Linear",
        lambda x, w, b, s: F.linear(x, w, b) * s,
        (constant(2, 4, 9), parameter(6, 9), parameter(6), parameter(6)),
    )
    yield Case(
        "layer scale of a frozen Linear",
        lambda x, w, b, s: F.linear(x, w, b) * s,
        (activation(2, 4, 9), constant(6, 9), constant(6), parameter(6)),
    )
    yield Case("layer scale twice", lambda x, w, b, s: F.linear(x, w, b) * s * s, weights)
    yield Case(
        "layer scale and the product too",
        lambda x, w, b, s: (y := F.linear(x, w, b)) * s + y.tanh(),
        weights,
    )
    yield Case(
        "layer scale after a cast", lambda x, w, b, s: F.linear(x, w, b).view(8, 6) * s, weights
    )
    yield Case("scale not after a Linear", lambda x, s: x * s, (activation(2, 4, 6), parameter(6)))
    yield Case(
        "scale in place, not after a Linear",
        lambda x, s: _imul(x.add(1.0), s),
        (activation(2, 4, 6), parameter(6)),
        fallback=True,
    )
    yield Case("scale in another shape", lambda x, s: x * s, (activation(2, 4, 6), parameter(4, 1)))
    yield Case("mul", torch.mul, (activation(2, 4, 6), activation(2, 4, 6)))
    yield Case("Tensor.mul", lambda x, y: x.mul(y), (activation(2, 4, 6), activation(2, 1, 6)))
    yield Case("mul with itself", lambda x: x * x, (activation(2, 4, 6),))
    yield Case(
        "mul with a scalar tensor", lambda x, y: x * y[0], (activation(2, 4, 6), parameter(1))
    )
    yield Case(
        "mul with a constant",
        lambda x, y: x * y,
        (activation(2, 4, 6), constant(4, 6)),
        fallback=True,
    )
    yield Case("mul with a number", lambda x: 2 * x * 0.5, (activation(2, 4, 6),), fallback=True)
    yield Case(
        "mul by keyword",
        lambda x, y: torch.mul(x, other=y),
        (activation(2, 4, 6), activation(2, 4, 6)),
    )
    yield Case("gate", lambda x, y: x * y.sigmoid(), (activation(2, 4, 6), activation(2, 4, 6)))


def _imul(x, y):
    x *= y
    return x


PRODUCTS = [*_linear(), *_matmul(), *_products()]
