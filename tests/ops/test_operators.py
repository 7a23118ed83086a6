"""Every operator by every property: one test body a property, tried on the table in operator_cases.py."""

import inspect
import re

import pytest
import torch
from operator_case import (
    EIGHT,
    EVERY,
    FOUR,
    LOSSLESS,
    call,
    error,
    gradients,
    run,
    tensors,
)
from operator_cases import CASES

from mesa_train import Policy
from mesa_train.ops import table

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def transposed(leaf):
    """The same values with the last two dims swapped in memory."""
    return (
        leaf.mT.clone(memory_format=torch.contiguous_format).mT if leaf.dim() > 1 else leaf.clone()
    )


def strided(leaf):
    """The same values, every other element of a larger tensor."""
    return torch.stack([leaf, leaf], -1)[..., 0] if leaf.dim() else leaf.clone()


def channels_last(leaf):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return leaf.clone(memory_format=formats.get(leaf.dim(), torch.contiguous_format))


def assert_same(found, expected):
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        assert f.shape == e.shape
        assert torch.equal(f.nan_to_num(7e7), e.nan_to_num(7e7))


@every_case
def test_the_row_is_found(case):
    made = tensors(case)
    outputs = call(case, made, EIGHT)  # they hold the graph
    nodes, todo = set(), [o.grad_fn for o in outputs if o.grad_fn is not None]
    while todo:
        node = todo.pop()
        nodes.add(node)
        todo += [
            following
            for following, _ in node.next_functions
            if following is not None and following not in nodes
        ]
    # PyTorch's own nodes have an attribute for each saved tensor instead.
    assert any(hasattr(n, "saved_tensors") for n in nodes) != case.fallback


@every_case
@pytest.mark.parametrize("preset", EVERY)
def test_forward_is_torchs_own_bit_for_bit(case, preset):
    plain = tensors(case, torch.float32)
    expected = call(case, plain, None)
    stream = torch.get_rng_state()
    ours = tensors(case, torch.float32)
    found = call(case, ours, EVERY[preset])
    # The generator too is where torch leaves it, and buffers such as running statistics hold what torch writes.
    assert torch.equal(torch.get_rng_state(), stream)
    assert_same(found, expected)
    assert [f.stride() for f in found] == [e.stride() for e in expected]
    assert_same(ours.constants, plain.constants)


@every_case
def test_lossless_gradients_are_torchs(case):
    outputs, expected, _ = run(case, None)
    found_outputs, found, _ = run(case, LOSSLESS)
    assert_same(found_outputs, outputs)
    assert [f.shape for f in found] == [e.shape for e in expected]
    # The order of float64 sums differs, nothing else.
    assert error(found, expected) < case.rounding


@pytest.mark.slow
@every_case
def test_lossless_gradients_without_lineage(case):
    policy = Policy(bits=32, min_bytes=0, recompute="none")
    expected, found = run(case, None)[1], run(case, policy)[1]
    assert error(found, expected) < case.rounding


@every_case
def test_lossless_gradients_with_matmuls_repeated(case):
    policy = Policy(bits=32, min_bytes=0, recompute="linear")
    expected, found = run(case, None)[1], run(case, policy)[1]
    assert error(found, expected) < case.rounding


@every_case
def test_gradcheck(case):
    made = tensors(case)
    before = [c.clone() for c in made.constants]

    def function(*leaves):
        given = iter(leaves)
        constants = iter(before)
        arguments = []
        for kind in case.inputs:
            if kind.role == "constant":
                arguments.append(next(constants).clone())
            else:
                arguments.append(next(given) if kind.role == "parameter" else next(given).clone())
        made.arguments[:] = arguments
        return tuple(o for o in call(case, made, LOSSLESS) if o.requires_grad)

    # The random projection of fast_mode sees every element at the price of two evaluations.
    assert torch.autograd.gradcheck(function, made.leaves, fast_mode=True)


@every_case
@pytest.mark.parametrize("bits", [8, 4])
def test_coded_gradients_are_close(case, bits):
    policy, bound = (EIGHT, case.eight) if bits == 8 else (FOUR, case.four)
    expected, found = run(case, None, torch.float32)[1], run(case, policy, torch.float32)[1]
    assert all(
        f.dtype == e.dtype and f.shape == e.shape for f, e in zip(found, expected, strict=True)
    )
    assert error(found, expected) < bound


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("layout", [transposed, strided, channels_last])
def test_other_layouts(case, layout):
    outputs, expected, _ = run(case, None, layout=layout)
    found_outputs, found, _ = run(case, LOSSLESS, layout=layout)
    assert_same(found_outputs, outputs)
    assert [f.stride() for f in found_outputs] == [e.stride() for e in outputs]
    assert error(found, expected) < case.rounding
    coded = run(case, EIGHT, layout=layout)[1]
    assert error(coded, expected) < case.eight


@every_case
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_bfloat16_is_as_good_as_torchs_own(case, how):
    if how == "bfloat16" and re.search("wider dtype|cumprod", case.name):
        pytest.skip("asks for float64")
    truth = run(case, None, torch.float32)[1]
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        made, ours = tensors(case, dtype), tensors(case, dtype)
        outputs = call(case, made, None)
        found_outputs = call(case, ours, EIGHT)
    assert_same(found_outputs, outputs)
    plain, found = gradients(outputs, made.leaves), gradients(found_outputs, ours.leaves)
    assert [f.dtype for f in found] == [p.dtype for p in plain]
    # Twice torch's own distance from float32, and what the codes add to it.
    assert error(found, truth) < 2 * error(plain, truth) + case.eight


@every_case
def test_backward_twice_and_two_forwards_before_it(case):
    made = tensors(case, torch.float32)
    outputs = call(case, made, FOUR)
    first = gradients(outputs, made.leaves, retain_graph=True)
    again = gradients(outputs, made.leaves)
    assert_same(again, first)
    made, other = tensors(case, torch.float32), tensors(case, torch.float32, seed=5)
    outputs = call(case, made, FOUR)
    others = call(case, other, FOUR)
    gradients(others, other.leaves)
    assert_same(gradients(outputs, made.leaves), first)


@every_case
def test_nothing_is_recorded_without_gradients(case):
    frozen = {"dtype": torch.float32, "requires_grad": False}
    expected = call(case, tensors(case, **frozen), None)
    with torch.no_grad():
        expected_unrecorded = call(case, tensors(case, torch.float32), None)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        found = call(case, tensors(case, **frozen), EIGHT)
        with torch.no_grad():
            unrecorded = call(case, tensors(case, torch.float32), EIGHT)
    assert not saved
    assert not any(f.requires_grad for f in (*found, *unrecorded))
    assert_same(found, expected)
    assert_same(unrecorded, expected_unrecorded)


@pytest.mark.slow
@every_case
def test_second_derivative_is_right_or_an_error_with_a_remedy(case):
    def second(policy):
        made = tensors(case)
        first = gradients(call(case, made, policy), made.leaves, create_graph=True)
        tracked = [g for g in first if g.requires_grad]
        total = sum((g * g).sum() for g in tracked)
        if not tracked:
            return first, None
        return first, torch.autograd.grad(total, made.leaves, allow_unused=True)

    def attempt(policy):
        try:
            return second(policy), ""
        except RuntimeError as refusal:
            return (None, None), str(refusal)

    (expected, expected_second), refusal = attempt(None)
    if refusal:
        assert refusal.startswith(("derivative for", "double backwards on"))
        pytest.skip("PyTorch has no second derivative here")
    disabled = []
    for _ in range(6):
        policy = Policy(
            bits=32, min_bytes=0, overrides={name: {"enabled": False} for name in disabled}
        )
        (found, found_second), refusal = attempt(policy)
        if not refusal:
            break
        assert refusal.endswith("or unwrap the model.")
        named = re.search(r"overrides=\{'(\w+)': \{'enabled': False\}\}", refusal)
        assert named is not None
        assert named[1] not in disabled, "the remedy did not help"
        disabled.append(named[1])
    assert error(found, expected) < case.rounding
    if expected_second is None:
        assert found_second is None or all(s is None or not s.any() for s in found_second)
        return
    assert found_second is not None
    for f, e in zip(found_second, expected_second, strict=True):
        e = torch.zeros(()) if e is None else e
        f = torch.zeros_like(e) if f is None else f
        torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-8)


@pytest.mark.slow
@every_case
def test_first_derivative_with_create_graph(case):
    made = tensors(case, torch.float32)
    expected = gradients(call(case, made, EIGHT), made.leaves)
    made = tensors(case, torch.float32)
    assert_same(
        [g.detach() for g in gradients(call(case, made, EIGHT), made.leaves, create_graph=True)],
        expected,
    )


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


ROWS = [function for function in table.ROWS if inspect.isfunction(function)]


@pytest.mark.parametrize("function", ROWS, ids=lambda f: f.__name__)
def test_the_defaults_of_a_row_are_pytorchs(function):
    own, torchs = defaults(table.ROWS[function]), defaults(function)
    assert {name: own[name] for name in own if name in torchs} == {
        name: torchs[name] for name in own if name in torchs
    }
