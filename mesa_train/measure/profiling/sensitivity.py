"""Measure how much each candidate's codes add to the gradient's error: a few backwards, and theory.

With a quantiser of 2^b - 1 steps, the variance of the error adds up over tensors (ActNN, arXiv
2104.14129; GACT, arXiv 2206.11357):

    Var = sum of c_l / (2^b - 1)^2

Therefore c_l needs no pass for each tensor. A kind is an operand of an operator. For each kind, one
pass codes all candidates in the blocks at 4 bits, and one pass at 2 bits. All other candidates are
uncompressed. The variance of the kind is divided among its candidates by the gradient errors of the
parameters around each. The variance at 8 bits follows from 4 bits by the formula.

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

from .candidates import KEEP, REBUILD, Candidate, as_policy

# (2^4 - 1)^2 / (2^8 - 1)^2, and (2^4 - 1)^2 / (2^2 - 1)^2.
_EIGHT = (15 / 255) ** 2
_TWO = (15 / 3) ** 2

# Variance of the 4-bit codes of a kind, relative to the squared gradient, for a model on meta.
# Measured on a ViT of width 192 (docs/benchmarks.md has the study).
_TYPICAL = {
    ("attention", "q"): 3e-3,
    ("attention", "k"): 3e-3,
    ("attention", "v"): 1e-3,
    ("attention", "out"): 3e-4,
    ("activation", "input"): 1e-4,
    ("checkpoint", "input"): 1e-2,
}
_OTHERWISE = 1e-3
# Up to this many candidates outside of blocks get passes of their own.
_FEW = 8


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Squares of relative errors of the gradient.

    Args:
        variance: added by each candidate, by choice. The inputs of checkpointed blocks are
            candidates too.
        coupled: added by the choice of a source if a product is rebuilt from that source.
        floor: error with everything uncompressed, against float32.
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
    everything: dict[Key, int | str] = {s.key: KEEP for s in candidates}
    progress("float32")
    exact = gradients(None)
    progress("all kept")
    reference = gradients(as_policy(base, list(candidates), everything))
    floor = relative_error(reference, exact) ** 2
    passes = 2
    variance: dict[tuple[Key, int | str], float] = {
        (s.key, c): 0.0 for s in candidates for c in (KEEP, REBUILD)
    }
    coupled: dict[tuple[Key, int | str], float] = {}
    sources = {s.source for s in candidates if s.source is not None}
    for own in _groups(candidates):
        kind = own[0].kind if len(own) > 1 else (*filter(None, own[0].key),)
        low: list[int] = [bits for bits in (4, 2) if bits in own[0].choices()] or [8]
        for bits in low:
            progress(f"{'.'.join(kind)} at {bits} bits")
            choices = {**everything, **{s.key: bits for s in own}}
            shares = _shares(
                own, names, gradients(as_policy(base, list(candidates), choices)), reference
            )
            variance |= {(key, bits): value for key, value in shares.items()}
            passes += 1
            if any(s.key in sources for s in own):
                progress(f"{'.'.join(kind)} at {bits} bits, rebuilding")
                # A product may be rebuilt from this candidate: its noise enters the product too.
                again = {
                    **choices,
                    **{s.key: REBUILD for s in candidates if s.source in choices and s.product},
                }
                found = _shares(
                    own, names, gradients(as_policy(base, list(candidates), again)), reference
                )
                coupled |= {
                    (key, bits): max(0.0, value - shares[key])
                    for key, value in found.items()
                    if key in sources
                }
                passes += 1
        if 4 in low:
            for candidate in own:
                variance[candidate.key, 8] = variance[candidate.key, 4] * _EIGHT
                if (candidate.key, 4) in coupled:
                    coupled[candidate.key, 8] = coupled[candidate.key, 4] * _EIGHT
    for input_bits, policy in (checkpointing or {}).items():
        progress(f"checkpoints' inputs at {input_bits or 'all'} bits")
        coded = gradients(policy)
        passes += 1
        if input_bits is None:
            reference = coded
            continue
        shares = _shares(inputs, names, coded, reference)
        variance |= {(key, input_bits): value for key, value in shares.items()}
    return Sensitivity(variance, coupled, floor, passes)


def typical(candidates: Sequence[Candidate]) -> Sensitivity:
    """Estimate the sensitivity of a model on meta, from theory and a study of a small ViT.

    Args:
        candidates: all candidates, and the inputs of checkpointed blocks.
    """
    variance: dict[tuple[Key, int | str], float] = {}
    coupled: dict[tuple[Key, int | str], float] = {}
    for kind in dict.fromkeys(s.kind for s in candidates):
        own = [s for s in candidates if s.kind == kind]
        total = sum(s.elements for s in own) or 1
        for candidate in own:
            four = _TYPICAL.get(kind, _OTHERWISE) * candidate.elements / total
            variance |= {
                (candidate.key, 8): four * _EIGHT,
                (candidate.key, 4): four,
                (candidate.key, 2): four * _TWO,
                (candidate.key, KEEP): 0.0,
                (candidate.key, REBUILD): 0.0,
            }
    for candidate in candidates:
        if candidate.source is not None:
            for bits, factor in ((8, _EIGHT), (4, 1.0), (2, _TWO)):
                more = variance.get((candidate.key, 4), 0.0) * factor
                coupled[candidate.source, bits] = coupled.get((candidate.source, bits), 0.0) + more
    return Sensitivity(variance, coupled, 0.0, 0)


def _groups(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Group the candidates that one pass codes together: all of one kind in the blocks.

    A candidate outside of blocks, such as the norm before the classifier, affects the gradient in
    its own way. It gets a pass of its own, unless there are many of them.
    """
    inside = [s for s in candidates if s.block is not None]
    outside = [s for s in candidates if s.block is None]
    alone = [[s] for s in outside] if inside and len(outside) <= _FEW else []
    rest = inside if alone else list(candidates)
    kinds = dict.fromkeys(s.kind for s in rest)
    return [*([s for s in rest if s.kind == kind] for kind in kinds), *alone]


def _shares(
    own: Sequence[Candidate],
    names: Sequence[str],
    gradients: Sequence[Tensor | None],
    reference: Sequence[Tensor | None],
) -> dict[Key, float]:
    """Divide the squared relative error of a pass among the coded candidates.

    The share of a candidate is in proportion to the squared error of the parameters around it, and
    to its number of elements.
    """
    norm = sum(_square(r) for r in reference) or 1.0
    errors: dict[str, float] = {}
    for name, gradient, exact in zip(names, gradients, reference, strict=True):
        if gradient is None or exact is None:
            continue
        errors[name] = _square(gradient.double() - exact.double())
    total = sum(errors.values())
    if not math.isfinite(total):
        return {s.key: math.inf for s in own}
    weights = {s.key: _around(s.key[0], errors) + 1e-3 * total for s in own}
    weights = {s.key: weights[s.key] * s.elements for s in own}
    whole = sum(weights.values()) or 1.0
    return {key: total / norm * weight / whole for key, weight in weights.items()}


def _around(module: str, errors: dict[str, float]) -> float:
    """The squared error of the parameters around a module.

    They are the parameters of the innermost numbered block that contains the module, else of the
    module itself.
    """
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    prefix = ".".join(parts[: numbers[-1] + 1]) if numbers else module
    return sum(e for name, e in errors.items() if not prefix or name.startswith(prefix + "."))


def _square(tensor: Tensor | None) -> float:
    """The sum of squares of a tensor; 0 for None."""
    return 0.0 if tensor is None else float(tensor.double().square().sum())


def parameter_names(model: nn.Module) -> list[str]:
    """Names of the trained parameters, in the order of their gradients."""
    return [name for name, p in model.named_parameters() if p.requires_grad]
