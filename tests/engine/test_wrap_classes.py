"""Classes of every kind are wrapped: registries, metaclasses, locked, abstract and generic classes, proxies."""

import abc
import dataclasses
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from wrapped_part import Part, assert_as_plain


def registry_with_a_key():
    class Registry(nn.Module):
        table: typing.ClassVar = {}

        def __init_subclass__(cls, *, key, **rest):
            super().__init_subclass__(**rest)
            assert key not in Registry.table
            Registry.table[key] = cls

    class Member(Registry, Part, key="member"):
        forward = Part.forward

    return Member


def metaclass():
    class Meta(type(nn.Module)):
        seen: typing.ClassVar = set()

        def __new__(mcs, name, bases, namespace):
            if name in mcs.seen:
                raise TypeError(f"duplicate {name}")
            mcs.seen.add(name)
            return super().__new__(mcs, name, bases, namespace)

    return Meta("Member", (Part,), {})


def final():
    class Final(Part):
        def __init_subclass__(cls, **rest):
            raise TypeError("do not subclass Final")

    return Final


def locked():
    class Locked(Part):
        def __init__(self):
            super().__init__()
            self.locked = True

        def __setattr__(self, name, value):
            if self.__dict__.get("locked"):
                raise AttributeError(f"locked: {name}")
            super().__setattr__(name, value)

        def __delattr__(self, name):
            raise AttributeError(f"locked: {name}")

    return Locked


def slots():
    class Slots(Part):
        __slots__ = ("more",)

    return Slots


def abstract():
    class Abstract(nn.Module, abc.ABC):
        @abc.abstractmethod
        def forward(self, x): ...

    class Concrete(Part, Abstract):
        pass

    return Concrete


def generic():
    T = typing.TypeVar("T")

    class Generic(Part, typing.Generic[T]):
        pass

    return Generic[int]


def dataclass():
    @dataclasses.dataclass(eq=False)
    class Data(nn.Module):
        width: int = 16

        def __post_init__(self):
            super().__init__()
            self.linear = nn.Linear(self.width, self.width)

        def forward(self, x):
            return F.gelu(self.linear(x))

    return Data


def exact_type():
    class Exact(Part):
        def forward(self, x):
            assert type(self) is Exact
            assert type(self.linear) is nn.Linear
            return super(type(self), self).forward(x)

    return Exact


def proxy():
    class Proxy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Part()

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, x):
            return self.inner(x) * self.factor

    return Proxy


def other_attributes():
    class Shown(Part):
        @property
        def __dict__(self):
            return {**nn.Module.__dict__["__dict__"].__get__(self), "shown": True}

    return Shown


def call():
    class Call(Part):
        def __call__(self, x):
            return self.forward(x) + self.linear(x)

    return Call


CLASSES = [registry_with_a_key, metaclass, final, locked, slots, abstract, generic, dataclass]
CLASSES += [exact_type, proxy, call, other_attributes]


@pytest.mark.parametrize("make", CLASSES, ids=lambda f: f.__name__)
def test_every_class(make):
    torch.manual_seed(0)
    assert_as_plain(make()())
