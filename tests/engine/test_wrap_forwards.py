"""Forwards of every kind are wrapped: bound to the instance, descriptors, scripts; signatures and names stay."""

import copy
import functools
import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from seeding import seed_torch
from torch import nn
from wrap_helpers import EIGHT, LOSSLESS, close, same
from wrapped_part import Part, X, assert_as_plain, gradients, part

import mesa_train
from mesa_train.engine.bound import entry_of
from mesa_train.engine.wrap import policy_of


class Called:
    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return F.gelu(self.module.linear(x)) * 3

    def method(self, x, times=1):
        return F.gelu(self.module.linear(x)) * times


OWN = {
    "method": lambda m: functools.partial(Part.forward, m, scale=2.0),
    "lambda": lambda m: lambda x, *rest: F.gelu(m.linear(x)),
    "another object's": lambda m: Called(m).method,
    "callable": lambda m: Called(m),
    "bound": lambda m: m.forward,
}


@pytest.mark.parametrize("name", OWN)
def test_a_forward_of_its_own(name):
    model = part()
    model.forward = own = OWN[name](model)
    signature = inspect.signature(own)
    assert_as_plain(model)
    assert model.forward == own
    mesa_train.wrap(model, EIGHT)
    assert inspect.signature(model.forward) == signature
    mesa_train.wrap(model, LOSSLESS)  # again: its own is still the one that came in
    mesa_train.unwrap(model)
    assert model.forward == own


def static():
    return staticmethod(lambda x: F.gelu(x))


def of_the_class():
    return classmethod(lambda cls, x: F.gelu(x))


def partial_method():
    return functools.partialmethod(Part.forward, scale=2.0)


def callable_object():
    return Called(nn.Module().add_module("linear", nn.Identity()) or part())


def module():
    return nn.GELU()


def decorated():
    def decorator(function):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            return function(*args, **kwargs) * 2

        return inner

    return decorator(Part.forward)


def dispatched():
    return functools.singledispatchmethod(Part.forward)


def closed_property():
    return property(lambda self: lambda x: Part.forward(self, x))


@pytest.mark.parametrize(
    "make",
    [
        static,
        of_the_class,
        partial_method,
        callable_object,
        module,
        decorated,
        dispatched,
        closed_property,
    ],
    ids=lambda f: f.__name__,
)
def test_a_forward_of_the_class(make):
    seed_torch(0)
    kind = type("Kind", (Part,), {"forward": make()})
    model = nn.Sequential(nn.Linear(16, 16), kind())
    signature = inspect.signature(model[1].forward)
    assert_as_plain(model)
    mesa_train.wrap(model, EIGHT)
    assert inspect.signature(model[1].forward) == signature
    assert ("forward" in vars(model[1])) == (make is not closed_property)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))


class Odd(Part):
    def forward(self, a, /, b, *rest, type=1, **kwargs) -> int:
        """Documented."""
        return super().forward(a), b, rest, type, kwargs


@pytest.mark.parametrize("kind", [Part, Odd, nn.MultiheadAttention, nn.Conv2d, nn.Sequential])
def test_whoever_reads_a_forward_reads_the_same(kind):
    arguments = {nn.MultiheadAttention: (16, 2), nn.Conv2d: (1, 1, 1)}.get(kind, ())
    plain, model = kind(*arguments), mesa_train.wrap(kind(*arguments), EIGHT)
    for read in (
        inspect.signature,
        inspect.getfullargspec,
        inspect.getsource,
        lambda f: f.__code__.co_varnames[: f.__code__.co_argcount],
        lambda f: (f.__name__, f.__qualname__, f.__module__, f.__doc__, f.__annotations__),
        lambda f: (f.__defaults__, f.__kwdefaults__, f.__globals__ is None),
    ):
        assert read(model.forward) == read(plain.forward)
    assert model.forward.__self__ is model

    @functools.wraps(model.forward)
    def around(*args, **kwargs):
        return model.forward(*args, **kwargs)

    assert inspect.signature(around) == inspect.signature(plain.forward)


def test_a_forward_whose_parameter_is_a_keyword_keeps_its_name_and_docstring():
    def written(self, x):
        """Documented."""
        return x * 2

    code = written.__code__.replace(co_varnames=("self", "class"))
    forward = types.FunctionType(code, {}, "forward")
    forward.__doc__, forward.__qualname__ = "Documented.", "Kind.forward"
    model = mesa_train.wrap(type("Kind", (nn.Module,), {"forward": forward})(), EIGHT)
    assert torch.equal(model(X), X * 2)
    assert (model.forward.__qualname__, model.forward.__doc__) == ("Kind.forward", "Documented.")


def test_arguments_arrive_as_they_were_given():
    model = mesa_train.wrap(Odd(), EIGHT)
    _, *rest = model(X, 1, 2, type=3, more=4)
    assert rest == [1, (2,), 3, {"more": 4}]
    _, *rest = model(X, b=5)
    assert rest == [5, (), 1, {}]
    with pytest.raises(TypeError, match=r"Odd.forward\(\) missing 1 required positional argument"):
        model(X)


def test_a_forward_that_the_class_gets_later():
    class Kind(Part):
        def forward(self, x, scale=1.0, *, more=0):
            return x * scale + more

    model = mesa_train.wrap(Kind(), EIGHT)
    Kind.forward = lambda self, x: x - 1
    assert torch.equal(model(X), X - 1)
    Kind.forward = lambda self, x, more=1: x * more
    assert torch.equal(model(X, more=3), X * 3)


def test_a_forward_that_the_module_gets_later():
    model = mesa_train.wrap(nn.Sequential(part(), part()), EIGHT)
    first, expected = model[0].forward, model[0](X)
    model[0].forward = lambda x: first(x) * 2
    assert torch.equal(model[0](X), expected * 2)
    mesa_train.wrap(model, EIGHT)
    assert torch.equal(model[0](X), expected * 2)
    mesa_train.unwrap(model)
    assert torch.equal(model[0](X), expected * 2)
    del model[0].forward
    assert torch.equal(model[0](X), expected)


def test_classes_that_are_exchanged_after():
    model = mesa_train.wrap(nn.Sequential(nn.LazyLinear(16), nn.GELU(), nn.Linear(16, 4)), EIGHT)
    gradients(model, X)
    gradients(model, X)
    assert type(model[0]) is nn.Linear
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
    gradients(model, X)
    nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    assert type(model[2]) is nn.Linear
    assert policy_of(model[2]) == EIGHT
    mesa_train.unwrap(model)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear]


def test_tables_keyed_by_type_find_their_types():
    model = mesa_train.wrap(nn.Sequential(nn.Linear(16, 16), nn.GELU()), EIGHT)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_a_script_inside_is_left_alone(make):
    seed_torch(0)
    inner = make(nn.Sequential(nn.LayerNorm(16), nn.GELU()))
    assert_as_plain(nn.Sequential(nn.Linear(16, 16), inner, nn.Linear(16, 4)))
    with pytest.raises(TypeError, match="wrap before scripting"):
        mesa_train.wrap(inner)


def test_a_wrap_that_fails_changes_nothing():
    model = mesa_train.wrap(nn.Sequential(part(), part()), "mesa4")
    before = [dict(vars(m)) for m in model.modules()]
    with pytest.raises(ValueError, match="matches no module"):
        mesa_train.wrap(model, mesa_train.Policy(overrides={"nowhere": {"bits": 4}}))

    class Closed:
        def __get__(self, module, kind):
            raise RuntimeError("not today")

    refusing = type("Refusing", (Part,), {"forward": Closed()})
    with pytest.raises(TypeError, match=r"cannot enter 1 \(Refusing\): not today"):
        mesa_train.wrap(nn.Sequential(model, refusing()), EIGHT)
    assert [dict(vars(m)) for m in model.modules()] == before
    assert policy_of(model) == mesa_train.PRESETS["mesa4"]


def test_a_checkpointed_module_is_checkpointed_once():
    """Also where its forward calls its parent's."""
    calls = []

    class Parent(Part):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    class Child(Parent):
        def forward(self, x):
            return super().forward(x) + super(type(self), self).forward(x)

    model = nn.Sequential(nn.Linear(16, 16), Child())
    mesa_train.wrap(model, mesa_train.Policy(min_bytes=0, checkpoint=("1",)))
    model(X).sum().backward()
    assert len(calls) == 4  # two in the forward, two in the recompute
    assert entry_of(model[1]).context.checkpointed


class Stored:
    """A descriptor that puts what it makes into the `__dict__`, where it is found from then on."""

    def __get__(self, module, kind=None):
        forward = functools.partial(Part.forward, module)
        vars(module)["forward"] = forward
        return forward


def cached():
    return functools.cached_property(lambda self: functools.partial(Part.forward, self))


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("make", [cached, Stored])
def test_a_forward_that_its_descriptor_stores(make, called):
    cls = type("Lazy", (Part,), {"forward": make()})
    seed_torch(0)
    model = nn.Sequential(nn.LayerNorm(16), cls())
    if called:
        model(X)
    mesa_train.wrap(mesa_train.wrap(model, EIGHT), EIGHT)
    seed_torch(0)
    plain = nn.Sequential(nn.LayerNorm(16), Part())
    assert torch.equal(model(X), plain(X))
    assert not same(gradients(model, X), gradients(plain, X))
    assert close(gradients(model, X), gradients(plain, X), 0.03)
    copied = copy.deepcopy(model)
    assert same(gradients(copied, X), gradients(model, X))
    mesa_train.unwrap(model)
    assert same(gradients(model, X), gradients(plain, X))
    assert [k for k in vars(model[1]) if k.startswith("_mesa")] == []


@pytest.mark.parametrize("kind", ["lru_cache", "singledispatchmethod"])
def test_a_forward_that_functools_made(kind):
    made = {
        "lru_cache": lambda: functools.lru_cache(maxsize=2)(Part.forward),
        "singledispatchmethod": lambda: functools.singledispatchmethod(Part.forward),
    }[kind]()
    seed_torch(0)
    model = type("Made", (Part,), {"forward": made})()
    expected, output = gradients(model, X), model(X)
    mesa_train.wrap(model, EIGHT)
    assert torch.equal(model(X.clone()), output)
    assert close(gradients(model, X.clone()), expected, 0.03)
