"""A field's checks are in its annotation. Every number of every configuration has one."""

import dataclasses
import re
import typing
from typing import Annotated

import pytest

from mesa_train.training import trainer
from mesa_train.training.classification import config as classification
from mesa_train.training.config_schema import (
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SHARE,
    ConfigError,
    OneOf,
    Range,
    check_fields,
    of_values,
)
from mesa_train.training.vit22b import config as vit22b

# Any number is allowed.
FREE = {"model.head_bias", "seed"}


def fields(schema, prefix=""):
    """(dotted name, annotation) of each field."""
    for name, hint in typing.get_type_hints(schema, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


@pytest.mark.parametrize("schema", [classification.Config, vit22b.Config, trainer.TrainConfig])
def test_every_number_has_a_check(schema):
    numbers = {
        name: hint for name, hint in fields(schema) if re.search(r"\b(int|float)\b", str(hint))
    }
    assert len(numbers) > 5
    unchecked = [n for n, hint in numbers.items() if typing.get_origin(hint) is not Annotated]
    assert set(unchecked) <= FREE


@pytest.mark.parametrize(
    ("check", "allowed", "refused", "message"),
    [
        (POSITIVE, [1, 1e-9], [0, -1, float("nan"), float("inf")], "must be positive, got"),
        (NOT_NEGATIVE, [0, 1], [-1e-9, float("nan")], "must not be negative, got"),
        (SHARE, [0, 0.99, (0.9, 0.999)], [1, -0.1, (0.9, 1.0)], r"must lie in \[0, 1\), got"),
        (PROBABILITY, [0, 1], [1.01, -0.1, float("nan")], r"must lie in \[0, 1\], got"),
        (Range(2.0), [(1, 1), (0.1, 2)], [(0, 1), (2, 1), (1, 2.1)], r"within 0 and 2, got \["),
        (Range(), [(1, 1e9)], [(-1, 1)], "must be a range within 0 and inf, got"),
        (
            OneOf(("red", "blue")),
            ["red"],
            ["rod"],
            r"one of red, blue, got 'rod' \(did you mean red",
        ),
    ],
)
def test_bounds(check, allowed, refused, message):
    for value in allowed:
        check("a.b", value)
    for value in refused:
        with pytest.raises(ConfigError, match=f"^a\\.b .*{message}"):
            check("a.b", value)


@dataclasses.dataclass(frozen=True)
class Section:
    low: Annotated[int, POSITIVE] = 1
    high: Annotated[int | None, POSITIVE] = None

    def check(self):
        if self.high is not None and self.high < self.low:
            raise ConfigError(f"high={self.high} must be at least low={self.low}")


def test_null_needs_no_check_and_fields_are_checked_before_their_relations():
    assert of_values(Section, {"high": None}) == Section()
    with pytest.raises(ConfigError, match=r"^x\.high must be positive, got -1$"):
        of_values(Section, {"high": -1}, "x.")
    with pytest.raises(ConfigError, match="high=2 must be at least low=3"):
        of_values(Section, {"high": 2, "low": 3})


def test_fields_of_a_dataclass_that_was_built_by_hand():
    check_fields(Section(1, 2))
    with pytest.raises(ConfigError, match=r"^low must be positive, got 0$"):
        check_fields(Section(0))
