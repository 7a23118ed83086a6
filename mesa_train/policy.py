"""Policy: which tensors are saved for the backward, in how many bits, and which are recomputed.

A `Policy` is a frozen value that holds no tensor and no model. `wrap` resolves it once per module
into `Rules`. The operators look up a rule by operator and operand name, and never use the policy.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import codecs
from .codecs.lossless import Lossless
from .utils import allocations, policy_checks, yaml_text
from .utils.patterns import is_inside, match_override, matching, near_miss

BITS = (8, 6, 5, 4, 3, 2, 32)
# The cost classes of rebuilding a stash, in rising order. A rule sets the highest class that it allows.
VIEW, CHEAP, MATMUL = 0, 1, 2
ROUNDINGS = ("auto", "nearest", "stochastic", "dither")
RECOMPUTE = ("none", "cheap", "linear")
RANGES = ("exact", "running")
FORWARDS = ("exact", "fused")
CHECKPOINT_INPUTS = (None, *BITS)

# Every operator with its operands. "attention.q" in an override names one operand, "attention" names all operands.
OPERATORS: dict[str, tuple[str, ...]] = {
    "linear": ("input",),
    "matmul": ("left", "right"),
    "attention": ("q", "k", "v", "out"),
    "softmax": ("output",),
    "layer_norm": ("normalized",),
    "rms_norm": ("normalized",),
    "group_norm": ("normalized",),
    "batch_norm": ("normalized",),
    "instance_norm": ("normalized",),
    "normalize": ("output",),
    "conv": ("input",),
    "mul": ("left", "right"),
    "dropout": ("mask",),
    "extremum": ("mask",),
    "activation": ("input", "output"),
    "loss": ("input",),
    "fallback": ("saved",),
    "checkpoint": ("input",),
}

# Operands that are rounded to nearest. They enter a nonlinear function in the backward, where random noise would not
# average out. All other operands enter linearly, and dither is unbiased for them. A norm's output enters linearly too,
# unless a matmul is recomputed from it: then q and k are exponentiated, and the MLP's hidden layer is activated.
_NEAREST = {("activation", "input"), ("activation", "output"), ("checkpoint", "input")}


@dataclasses.dataclass(frozen=True)
class Policy:
    """The choice of saved tensors for the backward. A frozen value.

    Args:
        bits: 8, 6, 5, 4, 3 or 2 bits per stored element; 32 saves the tensors themselves (lossless). Default 8.
        group_size: elements that share one scale and one zero (both bfloat16); at least 8, default 128. A group
            never contains elements of two tokens.
        rounding: "nearest", "stochastic", "dither" or "auto" (default). "dither" subtracts the random numbers of
            stochastic rounding when it decodes: unbiased too, at half the variance. Operands that enter a nonlinear
            function are rounded to nearest. "auto" is nearest at 8 bits and dither below (docs/internals/kernels.md).
        recompute: "none" stores every operand. "cheap" (default) rebuilds norms' outputs, activations, views and
            masks from stored operands. "linear" also recomputes a matmul if that frees its output (q, k, v, MLP
            hidden).
        min_bytes: tensors smaller than this stay uncompressed; default 16384 bytes.
        enabled: False leaves PyTorch alone (useful in overrides). Default True.
        ranges: "exact" (default) takes the minimum and maximum of each group. "running" is the scheme of Mesa's
            paper (arXiv 2111.11124): head-wise groups over the whole batch, running averages with decay 0.9. It
            needs bits=8, forward="exact", and rounding "stochastic" or "auto": it always rounds stochastically.
        forward: "exact" (default) calls PyTorch's own functions, so outputs equal PyTorch's bit for bit. "fused"
            runs norms, activations and softmax in kernels that make the codes in the same pass. Their outputs equal
            PyTorch's up to rounding. "fused" is for GPUs: on a CPU a step takes equally long with both. Tensors
            that are saved themselves (bits=32) come from PyTorch's functions.
        offload: True stores the stashes of a GPU in CPU memory until the backward: the codes, or with bits=32 the
            tensors (see `stash/offload.py`). On a CPU nothing is offloaded or copied. Default False.
        checkpoint: names of modules, with `*` for any part. The forward of such a module saves only its inputs and
            runs again in the backward. Inside another checkpointed module it has no further effect. Default: none.
        checkpoint_inputs: how activation checkpointing saves the inputs of its regions, the regions of this policy
            and all others. None (default) leaves these inputs to PyTorch. 8, 6, 5, 4, 3 or 2 saves codes of the inputs
            that need a gradient; 32 saves the tensors themselves. Does not affect what the regions save between
            recompute and backward.
        overrides: ordered mapping from a pattern to field changes; later entries win. A pattern is a module name
            with `*` for any part (it also covers submodules), an operator ("softmax"), an operand ("attention.q"),
            or a module and an operator joined by a colon ("blocks.*.mlp:linear"). "last_norm" is the last module
            that is a layer or RMS norm, "last_linear" the last linear layer, and "deformable_conv" all modules with
            DeformConv or DeformableConv in the names of their classes. Default: none.
    Raises:
        ValueError: a value is not one of the choices, or a field has no effect beside another; the message has
            the field, value and choices, and the pattern of an override.
        TypeError: a field has a wrong type; the message has the field and the value.
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
        policy_checks.choice("bits", self.bits, BITS)
        policy_checks.choice("rounding", self.rounding, ROUNDINGS)
        policy_checks.choice("recompute", self.recompute, RECOMPUTE)
        policy_checks.choice("ranges", self.ranges, RANGES)
        policy_checks.choice("forward", self.forward, FORWARDS)
        policy_checks.choice("checkpoint_inputs", self.checkpoint_inputs, CHECKPOINT_INPUTS)
        if isinstance(self.checkpoint, str) or not all(
            isinstance(pattern, str) for pattern in self.checkpoint
        ):
            raise TypeError(
                "Policy.checkpoint must list names of modules such as 'blocks.*', got "
                f"{self.checkpoint!r}"
            )
        object.__setattr__(self, "checkpoint", tuple(self.checkpoint))
        policy_checks.integer("group_size", self.group_size, 8)
        policy_checks.integer("min_bytes", self.min_bytes, 0)
        for field in ("enabled", "offload"):
            if not isinstance(value := getattr(self, field), bool):
                raise TypeError(f"Policy.{field} must be True or False, got {value!r}")
        if self.ranges == "running":
            policy_checks.running_ranges(self.bits, self.rounding, self.forward)
        policy_checks.mapping(self.overrides)
        object.__setattr__(self, "overrides", {k: dict(v) for k, v in self.overrides.items()})
        for pattern, changes in self.overrides.items():
            policy_checks.fields(pattern, changes, _OVERRIDABLE)
            try:
                self._changed(changes)
            except (TypeError, ValueError) as error:
                raise type(error)(f"Policy.overrides[{pattern!r}]: {error}") from None
            policy_checks.override(pattern, changes, OPERATORS, _NEAREST)

    def __hash__(self) -> int:
        return hash(self.to_yaml())

    def _changed(self, changes: Mapping[str, Any]) -> Policy:
        return dataclasses.replace(self, overrides={}, **changes)

    @classmethod
    def preset(cls, name: str) -> Policy:
        """Return the preset `name`, such as "mesa8" or "mesa8+offload". ValueError lists the choices."""
        known = {**PRESETS, **OFFLOADED}
        if name not in known:
            raise ValueError(
                f"unknown preset {name!r}; choose from {', '.join(PRESETS)}, PRESET+offload"
                f"{near_miss(name, known)}"
            )
        return known[name]

    @classmethod
    def of(cls, policy: Policy | str | None) -> Policy:
        """Return `policy` itself, the preset of that name, or "mesa8" for None; else TypeError."""
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
        """Return the policy as YAML text; write the text to `path` if it is given."""
        import yaml

        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Policy:
        """Read YAML text or a .yaml file. The key `preset` names the preset to start from. ValueError
        names unknown keys."""
        text = str(source)
        if isinstance(source, Path) or ("\n" not in text and text.endswith((".yaml", ".yml"))):
            text = Path(source).read_text()
        fields = yaml_text.read(text)
        if not isinstance(fields, dict):
            raise ValueError(f"a policy in YAML must be a mapping of fields, got {fields!r}")
        return cls.from_fields(yaml_text.by_field(fields, _TEXTS))

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Policy:
        """Read a mapping, as in a configuration file. `preset` and errors are as for `from_yaml`."""
        fields = dict(values)
        base = cls.preset(fields.pop("preset")) if "preset" in fields else cls()
        names = [f.name for f in dataclasses.fields(cls)]
        for key in fields:
            if key not in names:
                raise ValueError(
                    f"unknown policy field {key!r}; choose from {', '.join(names)}"
                    f"{near_miss(key, names)}"
                )
        return dataclasses.replace(base, **fields)

    def rules(
        self, modules: Iterable[str] = (), roles: Mapping[str, set[str]] | None = None
    ) -> dict[str, Rules]:
        """The `Rules` of each module, by qualified name.

        Args:
            modules: qualified names of the model's modules.
            roles: the modules that "last_norm", "last_linear" and "deformable_conv" mean. None: they mean no module.
        Raises:
            ValueError: an override matches neither a module nor an operator.
        """
        names = list(modules)
        matched = [match_override(pattern, names, OPERATORS, roles) for pattern in self.overrides]
        resolved: dict[str, Rules] = {}
        shared: dict[tuple[int, ...], Rules] = {}
        for name in names:
            applied = tuple(
                i for i, (covered, *_) in enumerate(matched) if covered is None or name in covered
            )
            if applied not in shared:
                changes = list(self.overrides.values())
                shared[applied] = Rules(self, [(*matched[i][1:], changes[i]) for i in applied])
            resolved[name] = shared[applied]
        rebuilds = any(
            [r.rebuild_linear for rules in shared.values() for r in rules.table.values()]
        )
        for rules in shared.values():
            rules.rebuilds_matmuls = rebuilds
        return resolved

    def checkpointed(self, modules: Iterable[str]) -> set[str]:
        """The modules that are checkpointed: the outermost modules that `checkpoint` names.

        Raises:
            ValueError: a pattern matches no module.
        """
        names = list(modules)
        matches: set[str] = set()
        for pattern in self.checkpoint:
            names_of_pattern = matching(pattern, names)
            if not names_of_pattern:
                near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.4)
                hint = f"; close names: {', '.join(near)}" if near else ""
                raise ValueError(f"Policy.checkpoint: {pattern!r} matches no module{hint}")
            matches |= names_of_pattern
        return {n for n in matches if not any(is_inside(n, o) for o in matches if o != n)}


_OVERRIDABLE = tuple(
    f.name for f in dataclasses.fields(Policy) if f.name not in ("overrides", "checkpoint")
)


_TEXTS = ("preset", "checkpoint", *(f.name for f in dataclasses.fields(Policy) if f.type == "str"))


class Rules:
    """The policy of one module. `rules[operator, operand]` is the `Rule` of one saved operand.

    `rebuilds_matmuls`: whether a rule of any module recomputes a matmul. `native`: these rules in C++.
    """

    def __init__(
        self,
        policy: Policy,
        changes: Sequence[tuple[str | None, str | None, Mapping[str, Any]]] = (),
    ) -> None:
        self.native: Any = None
        self.rebuilds_matmuls = False
        self.table: dict[tuple[str, str], Rule] = {}
        self.operators: dict[str, bool] = {}
        # Functions without a row that an override names. Each function is an operand of "fallback".
        self.functions = {on for by, on, _ in changes if by == "fallback" and on} - {"saved", None}
        for operator, operands in OPERATORS.items():
            named = sorted(self.functions) if operator == "fallback" else []
            for operand in [*operands, *named]:
                merged: dict[str, Any] = {}
                covering = (None, operand, "saved") if operand in named else (None, operand)
                for on_operator, on_operand, fields in changes:
                    if on_operator in (None, operator) and on_operand in covering:
                        merged.update(fields)
                # Unknown operators may use tensors in any way; a loss's error enters all gradients.
                effective = _merged(policy, merged, operator, operand)
                if operator in policy_checks.AT_LEAST_8 and effective.bits < 8:
                    effective = effective._changed({"bits": 8})
                elif operator == "checkpoint":
                    effective = _for_inputs(effective)
                self.table[operator, operand] = Rule.of(effective, operator, operand)
            self.operators[operator] = any(self.table[operator, o].enabled for o in operands)

    def __getitem__(self, key: tuple[str, str]) -> Rule:
        return self.table[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "native": None}


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one operand is saved.

    Attributes:
        codec: None for running ranges, whose codec is made at each use.
        rebuild_cheap, rebuild_linear: whether cheap functions, or matmuls, may be recomputed.
        fused: whether the forward may make the codes.
        offload: whether the stash is offloaded to CPU memory.
        limit: the highest cost class of a stash that the operand may be rebuilt from (see `stash.Stash`).
        lossless: whether the operand stays uncompressed.
    """

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
        """The rule of a policy for one operand; the policy's overrides have no effect."""
        nearest = (operator, operand) in _NEAREST or operator in policy_checks.AT_LEAST_8
        nearest |= policy.recompute == "linear" and operand == "normalized"
        rounding = policy.rounding
        if rounding == "auto":
            rounding = "dither" if policy.bits < 8 else "nearest"
        if rounding == "dither" and nearest:
            rounding = "nearest"
        codec = codecs.of(policy.bits, policy.group_size, rounding, policy.ranges == "running")
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


def _merged(policy: Policy, changes: Mapping[str, Any], operator: str, operand: str) -> Policy:
    """The policy for one operand. An error names the operand, since several overrides may cover it."""
    if not changes:
        return policy
    try:
        return policy._changed(changes)
    except ValueError as error:
        raise ValueError(f"Policy.overrides, together for {operator}.{operand}: {error}") from None


def _for_inputs(policy: Policy) -> Policy:
    """The policy for the inputs of a checkpoint: `checkpoint_inputs` as bits, and exact ranges."""
    bits = policy.checkpoint_inputs
    if bits is None:
        return dataclasses.replace(policy, enabled=False)
    return dataclasses.replace(policy, bits=bits, ranges="exact")


PRESETS: dict[str, Policy] = {
    "mesa8": Policy(),
    "mesa6": Policy(bits=6, overrides=allocations.OF_MESA6),
    "mesa4": Policy(bits=4, overrides=allocations.OF_MESA4),
    "mesa3": Policy(bits=3, overrides=allocations.OF_MESA3),
    "mesa8-recompute": Policy(recompute="linear"),
    "mesa6-recompute": Policy(bits=6, recompute="linear", overrides=allocations.OF_MESA6),
    "mesa4-recompute": Policy(bits=4, recompute="linear", overrides=allocations.OF_MESA4_RECOMPUTE),
    "lossless": Policy(bits=32),
    "paper": Policy(group_size=64, rounding="stochastic", recompute="none", ranges="running"),
}

# "PRESET+offload": the same preset, offloaded to CPU memory.
OFFLOADED: dict[str, Policy] = {
    f"{name}+offload": dataclasses.replace(policy, offload=True) for name, policy in PRESETS.items()
}
