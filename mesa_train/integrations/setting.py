"""Read a policy from an argument of an integration: a Policy, a preset, a file, or a YAML value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesa_train.policy import Policy

# The types that `policy_of_setting` reads.
Setting = Policy | str | Mapping[str, Any] | bool | None


def policy_of_setting(value: Setting) -> Policy | None:
    """The Policy of a setting; None for no wrapping.

    Args:
        value: a `Policy`, the name of a preset, the path of a policy's YAML file (it ends in .yaml
            or .yml), a mapping of fields of `Policy` (`preset` is the preset to start from), True
            for the default policy, or False or None for no wrapping.

    Raises:
        ValueError: the policy is wrong; the message has the field, the value and the choices.
        TypeError: the value has another type.
        OSError: the file cannot be read.
    """
    if value is None or value is False:
        return None
    if value is True:
        return Policy.of(None)
    if isinstance(value, Mapping):
        return Policy.from_fields(value)
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        return Policy.from_yaml(value)
    return Policy.of(value)
