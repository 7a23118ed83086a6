"""Policy: what is saved for the backward, in how many bits, and what is rebuilt instead.

A `Policy` is a frozen value: it holds no tensor and no model. `wrap` resolves it once per module
into `Rules`, which the operators consult by operator and operand name. An operator sees a codec and
two switches, never the policy.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import codecs
from .codecs.lossless import Lossless
from .utils import yaml_text
from .utils.patterns import is_inside, match_override, matching, near_miss

BITS = (8, 4, 2, 32)
# What rebuilding a stash costs, in rising order; a rule says how far up it may go.
VIEW, CHEAP, MATMUL = 0, 1, 2
ROUNDINGS = ("auto", "nearest", "stochastic")
RECOMPUTE = ("none", "cheap", "linear")
RANGES = ("exact", "running")
FORWARDS = ("exact", "fused")
CHECKPOINT_INPUTS = (None, 8, 4, 2, 32)

# Every operator with the operands it may keep. "attention.q" in an override names one operand,
# "attention" all.
OPERATORS: dict[str, tuple[str, ...]] = {
    "linear": ("input",),
    "matmul": ("left", "right"),
    "attention": ("q", "k", "v", "out"),
    "softmax": ("output",),
    "layer_norm": ("normalized",),
    "rms_norm": ("normalized",),
    "group_norm": ("normalized",),
    "batch_norm": ("normalized",),
    "normalize": ("output",),
    "conv": ("input",),
    "mul": ("left", "right"),
    "dropout": ("mask",),
    "extremum": ("mask",),
    "activation": ("input", "output"),
    "fallback": ("saved",),
    "checkpoint": ("input",),
}

# Inputs of element-wise nonlinearities enter a nonlinear function again in the backward, where the
# noise of stochastic rounding would not average out; everything else enters linearly, where
# stochastic rounding is unbiased. A norm's output enters linearly too, unless a matmul is rebuilt from
# it: then q and k are exponentiated and the MLP's hidden is activated.
_NEAREST = {
    ("activation", "input"),
    ("activation", "output"),
    ("checkpoint", "input"),
}


@dataclasses.dataclass(frozen=True)
class Policy:
    """What to keep between forward and backward, and how.

    bits: 8, 4 or 2 bits per stored element; 32 keeps the tensors themselves (lossless).
    group_size: elements that share one scale and zero (both bfloat16). Groups never cross a token.
    rounding: "nearest", "stochastic", or "auto": nearest at 8 bits and for whatever enters a
        nonlinear function, stochastic for what enters linearly at fewer bits (see docs/design.md
        for the measurements).
    recompute: "none" stores every operand; "cheap" rebuilds norms' outputs, activations, views and
        masks from what is stored already; "linear" also repeats a matmul where that frees its
        output (q, k, v, MLP hidden).
    min_bytes: tensors smaller than this are kept as they are.
    enabled: False leaves PyTorch alone (useful in overrides).
    ranges: "exact" takes each group's own minimum and maximum; "running" is the scheme of Mesa's
        paper (arXiv 2111.11124): head-wise groups over the whole batch, running averages with decay
        0.9.
    forward: "exact" calls PyTorch's own functions, so that outputs are theirs bit for bit; "fused"
        lets norms, activations and softmax run in kernels that make the codes in the same pass,
        equal to PyTorch's to rounding. For GPUs: on a CPU a step takes as long either way.
    offload: on a GPU, what is stored waits in CPU memory until the backward: the codes, or with
        bits=32 the tensors (see `offload.py`). On a CPU nothing is moved, nor copied.
    checkpoint: names of modules, with `*` for any part, whose forward keeps its inputs alone and
        runs again in the backward; inside another one that is checkpointed, nothing more happens.
    checkpoint_inputs: None leaves alone what activation checkpointing itself keeps, the inputs of
        its regions (this policy's and anybody's); 8, 4 or 2 keeps codes of those that need a
        gradient, 32 the tensors themselves. Says nothing about how the regions' insides are kept
        between recompute and backward.
    overrides: ordered mapping from a pattern to field changes, later entries win. A pattern is a
        module name with `*` for any part of it (it covers the submodules too), an operator
        ("softmax"), an operand ("attention.q"), or both joined by a colon ("blocks.*.mlp:linear").

    Raises ValueError or TypeError naming the field, the value and the choices.
    """

    bits: int = 8
    group_size: int = 128
    rounding: str = "auto"
    recompute: str = "cheap"
    min_bytes: int = 16384
    enabled: bool = True
    ranges: str = "exact"
    forward: str = "exact"
    offload: bool = False
    checkpoint: Sequence[str] = ()
    checkpoint_inputs: int | None = None
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _choice("bits", self.bits, BITS)
        _choice("rounding", self.rounding, ROUNDINGS)
        _choice("recompute", self.recompute, RECOMPUTE)
        _choice("ranges", self.ranges, RANGES)
        _choice("forward", self.forward, FORWARDS)
        _choice("checkpoint_inputs", self.checkpoint_inputs, CHECKPOINT_INPUTS)
        if isinstance(self.checkpoint, str) or not all(
            isinstance(pattern, str) for pattern in self.checkpoint
        ):
            raise TypeError(
                "Policy.checkpoint must list names of modules such as 'blocks.*', got "
                f"{self.checkpoint!r}"
            )
        object.__setattr__(self, "checkpoint", tuple(self.checkpoint))
        _integer("group_size", self.group_size, 8)
        _integer("min_bytes", self.min_bytes, 0)
        for field in ("enabled", "offload"):
            if not isinstance(given := getattr(self, field), bool):
                raise TypeError(f"Policy.{field} must be True or False, got {given!r}")
        if self.ranges == "running" and self.bits != 8:
            raise ValueError(f"Policy.ranges='running' stores 8 bits, got bits={self.bits}")
        if not isinstance(self.overrides, Mapping):
            raise TypeError(
                "Policy.overrides must map patterns to field changes, got "
                f"{type(self.overrides).__name__}"
            )
        for pattern, changes in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(changes, Mapping):
                raise TypeError(
                    f"Policy.overrides must map patterns to field changes, got {pattern!r}: {changes!r}"
                )
        object.__setattr__(self, "overrides", {k: dict(v) for k, v in self.overrides.items()})
        for pattern, changes in self.overrides.items():
            for field in changes:
                if field not in _OVERRIDABLE:
                    raise ValueError(
                        f"Policy.overrides[{pattern!r}] sets unknown field {field!r}; "
                        f"choose from {', '.join(_OVERRIDABLE)}{near_miss(field, _OVERRIDABLE)}"
                    )
            self._changed(changes)

    def __hash__(self) -> int:
        return hash(self.to_yaml())

    def _changed(self, changes: Mapping[str, Any]) -> Policy:
        return dataclasses.replace(self, overrides={}, **changes)

    @classmethod
    def preset(cls, name: str) -> Policy:
        """The preset called `name`, also with "+offload" behind it; ValueError lists the choices."""
        known = {**PRESETS, **OFFLOADED}
        if name not in known:
            raise ValueError(
                f"unknown preset {name!r}; choose from {', '.join(PRESETS)}, PRESET+offload"
                f"{near_miss(name, known)}"
            )
        return known[name]

    @classmethod
    def of(cls, policy: Policy | str | None) -> Policy:
        """`policy` itself, the preset of that name, or the default for None."""
        if policy is None:
            return PRESETS["mesa8"]
        if isinstance(policy, str):
            return cls.preset(policy)
        if not isinstance(policy, Policy):
            raise TypeError(
                f"policy must be a Policy, a preset's name or None, got {type(policy).__name__}"
            )
        return policy

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The policy as YAML text, also written to `path` if given."""
        import yaml

        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Policy:
        """From YAML text or a file; a key `preset` starts from it. ValueError names unknown keys."""
        text = str(source)
        if isinstance(source, Path) or ("\n" not in text and text.endswith((".yaml", ".yml"))):
            text = Path(source).read_text()
        fields = yaml_text.read(text)
        if not isinstance(fields, dict):
            raise ValueError(f"a policy in YAML is a mapping of fields, got {fields!r}")
        return cls.from_fields(yaml_text.by_field(fields, _TEXTS))

    @classmethod
    def from_fields(cls, given: Mapping[str, Any]) -> Policy:
        """From a mapping of fields, as a configuration file holds it; a key `preset` starts from that
        preset. ValueError names unknown keys."""
        fields = dict(given)
        base = cls.preset(fields.pop("preset")) if "preset" in fields else cls()
        names = [f.name for f in dataclasses.fields(cls)]
        for key in fields:
            if key not in names:
                raise ValueError(
                    f"unknown policy field {key!r}; choose from {', '.join(names)}"
                    f"{near_miss(key, names)}"
                )
        return dataclasses.replace(base, **fields)

    def rules(self, modules: Iterable[str] = ()) -> dict[str, Rules]:
        """Resolve for each module name. ValueError if an override matches neither a module nor an
        operator."""
        names = list(modules)
        matched = [match_override(pattern, names, OPERATORS) for pattern in self.overrides]
        resolved: dict[str, Rules] = {}
        shared: dict[tuple[int, ...], Rules] = {}
        for name in names:
            hits = tuple(
                i for i, (covered, *_) in enumerate(matched) if covered is None or name in covered
            )
            if hits not in shared:
                changes = list(self.overrides.values())
                shared[hits] = Rules(self, [(*matched[i][1:], changes[i]) for i in hits])
            resolved[name] = shared[hits]
        rebuilds = any(
            [r.rebuild_linear for rules in shared.values() for r in rules.table.values()]
        )
        for rules in shared.values():
            rules.rebuilds_matmuls = rebuilds
        return resolved

    def checkpointed(self, modules: Iterable[str]) -> set[str]:
        """Which modules are checkpointed: those that `checkpoint` names, the outermost ones.
        ValueError if a pattern matches none."""
        names = list(modules)
        hit: set[str] = set()
        for pattern in self.checkpoint:
            found = matching(pattern, names)
            if not found:
                near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.4)
                hint = f"; close names: {', '.join(near)}" if near else ""
                raise ValueError(f"Policy.checkpoint: {pattern!r} matches no module{hint}")
            hit |= found
        return {n for n in hit if not any(is_inside(n, o) for o in hit if o != n)}


_OVERRIDABLE = tuple(
    f.name for f in dataclasses.fields(Policy) if f.name not in ("overrides", "checkpoint")
)


_TEXTS = ("preset", "checkpoint", *(f.name for f in dataclasses.fields(Policy) if f.type == "str"))


class Rules:
    """One module's policy: `rules[operator, operand]` is the `Rule` for what that operator
    keeps. rebuilds_matmuls: whether a rule of any module of the model rebuilds the results of matmuls."""

    def __init__(
        self,
        policy: Policy,
        changes: Iterable[tuple[str | None, str | None, Mapping[str, Any]]] = (),
    ) -> None:
        changes = list(changes)
        self.rebuilds_matmuls = False
        self.table: dict[tuple[str, str], Rule] = {}
        self.operators: dict[str, bool] = {}
        # The functions without a row that an override names: each is an operand of "fallback".
        self.functions = {on for by, on, _ in changes if by == "fallback" and on} - {"saved", None}
        for operator, operands in OPERATORS.items():
            named = sorted(self.functions) if operator == "fallback" else []
            for operand in [*operands, *named]:
                merged: dict[str, Any] = {}
                covering = (None, operand, "saved") if operand in named else (None, operand)
                for on_operator, on_operand, fields in changes:
                    if on_operator in (None, operator) and on_operand in covering:
                        merged.update(fields)
                # Codes of an unknown operator's tensors: nothing is known of how it uses them, so
                # never below 8 bits.
                effective = policy._changed(merged)
                if operator == "fallback" and effective.bits < 8:
                    effective = dataclasses.replace(effective, bits=8)
                if operator == "checkpoint":
                    effective = _for_inputs(effective)
                self.table[operator, operand] = Rule.of(effective, operator, operand)
            self.operators[operator] = any(self.table[operator, o].enabled for o in operands)

    def __getitem__(self, key: tuple[str, str]) -> Rule:
        return self.table[key]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one operand is kept: by which codec (None: running ranges, bound at each use), what may be
    rebuilt, whether the forward may make its codes, and whether they wait in CPU memory.

    limit: the dearest step of a stash that the operand may be rebuilt from (see `stash.Stash`). lossless: the
        operand is kept as it is."""

    enabled: bool
    codec: Any
    group_size: int
    rebuild_cheap: bool
    rebuild_linear: bool
    min_bytes: int
    fused: bool
    offload: bool
    limit: int
    lossless: bool

    @classmethod
    def of(cls, policy: Policy, operator: str, operand: str) -> Rule:
        """The rule of a policy without overrides for one operand."""
        nearest = (operator, operand) in _NEAREST or operator == "fallback"
        nearest |= policy.recompute == "linear" and operand == "normalized"
        stochastic = policy.rounding == "stochastic" or (
            policy.rounding == "auto" and policy.bits < 8 and not nearest
        )
        codec = codecs.of(policy.bits, policy.group_size, stochastic, policy.ranges == "running")
        return cls(
            enabled=policy.enabled,
            codec=codec,
            group_size=policy.group_size,
            rebuild_cheap=policy.recompute in ("cheap", "linear"),
            rebuild_linear=policy.recompute == "linear",
            min_bytes=policy.min_bytes,
            fused=policy.forward == "fused",
            offload=policy.offload,
            limit={"cheap": CHEAP, "linear": MATMUL}.get(policy.recompute, VIEW),
            lossless=isinstance(codec, Lossless),
        )


def _for_inputs(policy: Policy) -> Policy:
    """The policy for what a checkpoint keeps: its own bits, each tensor's own ranges."""
    bits = policy.checkpoint_inputs
    if bits is None:
        return dataclasses.replace(policy, enabled=False)
    return dataclasses.replace(policy, bits=bits, ranges="exact")


def _choice(field: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices or isinstance(value, bool):
        raise ValueError(
            f"Policy.{field} must be one of {', '.join(map(str, choices))}, got {value!r}"
        )


def _integer(field: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Policy.{field} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"Policy.{field} must be at least {least}, got {value}")


_QK8 = {"attention.q": {"bits": 8}, "attention.k": {"bits": 8}}
# Short groups cost bytes; only tensors that a matmul is rebuilt from, or that stand in for one, need them.
_LONG_GROUPS = {
    operator: {"group_size": 128}
    for operator in (
        *("conv", "batch_norm", "group_norm", "activation", "mul"),
        *("linear", "softmax", "matmul", "normalize", "fallback"),
    )
}

PRESETS: dict[str, Policy] = {
    "mesa8": Policy(),
    "mesa4": Policy(bits=4, overrides=_QK8),
    "mesa8-recompute": Policy(recompute="linear"),
    "mesa4-recompute": Policy(bits=4, group_size=32, recompute="linear", overrides=_LONG_GROUPS),
    "lossless": Policy(bits=32),
    "paper": Policy(group_size=64, rounding="stochastic", recompute="none", ranges="running"),
}

# By the name of a preset with "+offload": the same, waiting in CPU memory.
OFFLOADED: dict[str, Policy] = {
    f"{name}+offload": dataclasses.replace(policy, offload=True) for name, policy in PRESETS.items()
}
