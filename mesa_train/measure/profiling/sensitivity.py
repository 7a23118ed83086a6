"""Measure how much each candidate's codes add to the gradient's error.

With a quantiser of 2^b - 1 steps, the variance of the error adds up over tensors (ActNN, arXiv
2104.14129; GACT, arXiv 2206.11357):

    Var = sum of c_l / (2^b - 1)^2

Therefore one pass measures many tensors at once. A kind is an operand of an operator. For each kind,
one pass codes all candidates in the blocks at 4 bits, and one pass at 2 bits. All other candidates
are uncompressed. The variance of the kind is divided among its candidates by the gradient errors of
the parameters around each. The variance at the other bits follows from 4 bits by the formula.

Cost: about fifteen passes for a ViT.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from mesa_train.measure.stash_log import Key
from mesa_train.measure.step import relative_error
from mesa_train.policy import Policy

from .blocks import GROUP
from .candidates import KEEP, REBUILD, Candidate, as_policy

# The variance at other bits, relative to 4 bits.
_RELATIVE = {bits: (15 / (2**bits - 1)) ** 2 for bits in GROUP}

# Variance of the 4-bit codes of a kind, relative to the squared gradient, for a model on meta. The
# values are the squared errors of single operands of a trained small ViT ("small_vit after 200
# steps" in docs/results/presets.jsonl); q and k have half of their common value each. With random
# weights the order is another: the activation's input adds most. The last value is an estimate.
_TYPICAL = {
    ("layer_norm", "normalized"): 7e-4,
    ("rms_norm", "normalized"): 7e-4,
    ("attention", "q"): 1.4e-3,
    ("attention", "k"): 1.4e-3,
    ("attention", "v"): 6.5e-4,
    ("attention", "out"): 3.5e-4,
    ("activation", "input"): 8e-5,
    ("conv", "input"): 9e-5,
    ("checkpoint", "input"): 1e-2,
}
# Of a kind that was not measured: above the measured kinds with linear operands.
_TYPICAL_DEFAULT = 1e-3
# If at most this many candidates are outside of blocks, each gets a pass of its own.
_MAX_SINGLE_PASSES = 8


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Squares of relative errors of the gradient.

    Args:
        variance: added by each candidate, by choice. The inputs of checkpointed blocks are
            candidates too.
        coupled: added by the choice of a source if a Linear is recomputed from that source.
        floor: error with all candidates uncompressed, against float32.
        passes: number of forwards with backwards that ran.
    """

    variance: dict[tuple[Key, int | str], float]
    coupled: dict[tuple[Key, int | str], float]
    floor: float
    passes: int


def calibrate(
    candidates: Sequence[Candidate],
    base: Policy,
    gradients: Callable[[Policy | str | None], list[Tensor | None]],
    names: Sequence[str],
    progress: Callable[[str], None] = lambda _: None,
    inputs: Sequence[Candidate] = (),
    checkpointing: Mapping[int | None, Policy] | None = None,
) -> Sensitivity:
    """Measure the sensitivity.

    Args:
        candidates: all candidates.
        base: policy of all fields that the choices do not set.
        gradients: runs one pass with a policy and returns the gradients of the parameters; "plain"
            runs without mesa_train, None in float32.
        names: names of these parameters.
        progress: called with the name of each pass.
        inputs: the saved inputs of checkpointed blocks, as candidates.
        checkpointing: policies that checkpoint all blocks, by the bits of these inputs; None comes
            first.
    """
    uncompressed: dict[Key, int | str] = {candidate.key: KEEP for candidate in candidates}
    progress("float32")
    exact = gradients(None)
    progress("uncompressed")
    reference = gradients(as_policy(base, list(candidates), uncompressed))
    floor = relative_error(reference, exact) ** 2
    passes = 2
    variance: dict[tuple[Key, int | str], float] = {
        (candidate.key, choice): 0.0 for candidate in candidates for choice in (KEEP, REBUILD)
    }
    coupled: dict[tuple[Key, int | str], float] = {}
    sources = {candidate.source for candidate in candidates if candidate.source is not None}
    for group in _groups(candidates):
        kind = group[0].kind if len(group) > 1 else (*filter(None, group[0].key),)
        tested_bits: list[int] = [bits for bits in (4, 2) if bits in group[0].choices()] or [8]
        for bits in tested_bits:
            progress(f"{'.'.join(kind)} at {bits} bits")
            choices = {**uncompressed, **{candidate.key: bits for candidate in group}}
            shares = _divide_error(
                group, names, gradients(as_policy(base, list(candidates), choices)), reference
            )
            variance |= {(key, bits): value for key, value in shares.items()}
            passes += 1
            if any(candidate.key in sources for candidate in group):
                progress(f"{'.'.join(kind)} at {bits} bits, rebuilding")
                # A Linear may be recomputed from this candidate. Its output then has this noise too.
                rebuilding = {
                    **choices,
                    **{
                        candidate.key: REBUILD
                        for candidate in candidates
                        if candidate.source in choices and candidate.product
                    },
                }
                with_rebuild = _divide_error(
                    group,
                    names,
                    gradients(as_policy(base, list(candidates), rebuilding)),
                    reference,
                )
                coupled |= {
                    (key, bits): max(0.0, value - shares[key])
                    for key, value in with_rebuild.items()
                    if key in sources
                }
                passes += 1
        if 4 in tested_bits:
            for candidate in group:
                tables: list[dict[tuple[Key, int | str], float]] = [variance, coupled]
                for table in tables:
                    if (candidate.key, 4) in table:
                        for other, factor in _RELATIVE.items():
                            if other not in tested_bits:
                                table[candidate.key, other] = table[candidate.key, 4] * factor
    for input_bits, policy in (checkpointing or {}).items():
        progress(f"checkpoint inputs at {input_bits or 'all'} bits")
        coded = gradients(policy)
        passes += 1
        if input_bits is None:
            reference = coded
            continue
        shares = _divide_error(inputs, names, coded, reference)
        variance |= {(key, input_bits): value for key, value in shares.items()}
    return Sensitivity(variance, coupled, floor, passes)


def typical(candidates: Sequence[Candidate]) -> Sensitivity:
    """Estimate the sensitivity of a model on meta, from theory and errors of a trained small ViT.

    Args:
        candidates: all candidates, and the inputs of checkpointed blocks.
    """
    variance: dict[tuple[Key, int | str], float] = {}
    coupled: dict[tuple[Key, int | str], float] = {}
    for kind in dict.fromkeys(candidate.kind for candidate in candidates):
        same_kind = [candidate for candidate in candidates if candidate.kind == kind]
        total = sum(candidate.elements for candidate in same_kind) or 1
        for candidate in same_kind:
            at_4_bits = _TYPICAL.get(kind, _TYPICAL_DEFAULT) * candidate.elements / total
            for bits, factor in _RELATIVE.items():
                variance[candidate.key, bits] = at_4_bits * factor
            variance |= {(candidate.key, KEEP): 0.0, (candidate.key, REBUILD): 0.0}
    for candidate in candidates:
        if candidate.source is not None:
            for bits, factor in _RELATIVE.items():
                added = variance.get((candidate.key, 4), 0.0) * factor
                coupled[candidate.source, bits] = coupled.get((candidate.source, bits), 0.0) + added
    return Sensitivity(variance, coupled, 0.0, 0)


def _groups(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Group the candidates that one pass codes together: all of one kind in the blocks.

    A candidate outside of blocks, such as the norm before the classifier, affects the gradient in
    its own way. It gets a pass of its own, unless there are more than _MAX_SINGLE_PASSES of them.
    """
    inside = [candidate for candidate in candidates if candidate.block is not None]
    outside = [candidate for candidate in candidates if candidate.block is None]
    singles = (
        [[candidate] for candidate in outside]
        if inside and len(outside) <= _MAX_SINGLE_PASSES
        else []
    )
    grouped = inside if singles else list(candidates)
    kinds = dict.fromkeys(candidate.kind for candidate in grouped)
    return [
        *([candidate for candidate in grouped if candidate.kind == kind] for kind in kinds),
        *singles,
    ]


def _divide_error(
    group: Sequence[Candidate],
    names: Sequence[str],
    gradients: Sequence[Tensor | None],
    reference: Sequence[Tensor | None],
) -> dict[Key, float]:
    """Divide the squared relative error of a pass among the coded candidates.

    The share of a candidate is in proportion to the squared error of the parameters around it, and
    to its number of elements.
    """
    norm = sum(_sum_of_squares(gradient) for gradient in reference) or 1.0
    errors: dict[str, float] = {}
    for name, gradient, exact in zip(names, gradients, reference, strict=True):
        if gradient is None or exact is None:
            continue
        errors[name] = _sum_of_squares(gradient.double() - exact.double())
    total = sum(errors.values())
    if not math.isfinite(total):
        return {candidate.key: math.inf for candidate in group}
    weights = {
        candidate.key: _error_around(candidate.key[0], errors) + 1e-3 * total for candidate in group
    }
    weights = {candidate.key: weights[candidate.key] * candidate.elements for candidate in group}
    total_weight = sum(weights.values()) or 1.0
    return {key: total / norm * weight / total_weight for key, weight in weights.items()}


def _error_around(module: str, errors: dict[str, float]) -> float:
    """The squared error of the parameters around a module.

    They are the parameters of the innermost numbered block that contains the module, else of the
    module itself.
    """
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    prefix = ".".join(parts[: numbers[-1] + 1]) if numbers else module
    return sum(
        error for name, error in errors.items() if not prefix or name.startswith(prefix + ".")
    )


def _sum_of_squares(tensor: Tensor | None) -> float:
    """The sum of squares of a tensor; 0 for None."""
    return 0.0 if tensor is None else float(tensor.double().square().sum())


def parameter_names(model: nn.Module) -> list[str]:
    """Names of the trained parameters, in the order of their gradients."""
    return [name for name, p in model.named_parameters() if p.requires_grad]
