"""Energy-based identification of unknowns: free energy, Weibull fits, and the decision per detection.

The published code works with the negative free energy: T log sum_i exp(logit_i / T) over the known
classes. It is large for known-like detections. So does this file.

Two decisions exist. `classify_by_energy` compares two Weibull densities, one of known and one of
unknown detections, as the published code does. ORE's authors fit the second one on labelled
unknowns, which an open-world detector does not have. `EnergyIdentifier` therefore has the mode
"known_tail", which needs known detections alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mesa_train.models.dense.boxes import widened

DELETED = -100
MODES = ("off", "known_tail", "two_fits")
OUTSIDE = ("keep", "unknown")
SAMPLES = ("detections", "proposals")
_POINTS = 100


def energy(logits: Tensor, seen: int, temperature: float = 1.0) -> Tensor:
    """The negative free energy over the known classes; large means known.

    Args:
        logits: (N, C), known classes first.
        seen: number of known classes. Logits from there on (unseen, unknown, background) are left
            out.
        temperature: T; default 1. The published code fits at 1.5 and tests at 1.
    Returns:
        T log sum exp(logit / T), (N,).
    Raises:
        ValueError: seen or temperature is out of range.
    """
    if not 1 <= seen <= logits.shape[-1]:
        raise ValueError(f"seen must lie in 1 to {logits.shape[-1]}, got {seen}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return temperature * (logits[..., :seen] / temperature).logsumexp(-1)


class Weibull(NamedTuple):
    """A Weibull distribution with three parameters.

    Attributes:
        scale: alpha, positive.
        shape: beta, positive.
        shift: gamma, the lower end of the support.
    """

    scale: float
    shape: float
    shift: float

    def density(self, x: Tensor) -> Tensor:
        """The density; NaN at or below the shift."""
        z = (x - self.shift) / self.scale
        z = torch.where(z > 0, z, torch.nan)
        return self.shape / self.scale * z ** (self.shape - 1) * torch.exp(-(z**self.shape))

    def around(self, x: Tensor, width: float = 1.0) -> Tensor:
        """Probability of `width` around each x: the mean density of 100 points times the width.

        It is NaN if one of the points is at or below the shift.
        """
        steps = torch.linspace(-width / 2, width / 2, _POINTS, dtype=torch.float64)
        points = x.double()[..., None] + steps.to(x.device)
        return (self.density(points).mean(-1) * width).to(x.dtype)

    def log_likelihood(self, x: Tensor) -> float:
        """The sum of log densities."""
        return float(self.density(x.double()).log().sum())

    def quantile(self, share: float) -> float:
        """The value below which a share in [0, 1) of the distribution lies."""
        tail = -torch.log1p(torch.tensor(-share, dtype=torch.float64))
        return self.shift + self.scale * float(tail ** (1 / self.shape))


def fit_weibull(samples: Any) -> Weibull:
    """Fit a Weibull distribution with three parameters by maximum likelihood.

    Args:
        samples: at least 10 finite numbers of at least 3 values, a tensor or an array.
    Returns:
        (scale, shape, shift).
    Raises:
        ValueError: the samples are too few, not finite or constant.
        ImportError: scipy is missing.
    """
    try:
        from scipy.stats import weibull_min
    except ImportError:
        raise ImportError("fit_weibull needs scipy: pip install 'mesa_train[evaluation]'") from None
    import numpy as np

    x = torch.as_tensor(samples).detach().double().flatten().cpu().numpy()
    if len(x) < 10:
        raise ValueError(f"a Weibull fit needs at least 10 samples, got {len(x)}")
    if not np.isfinite(x).all():
        raise ValueError(f"a Weibull fit needs finite samples, got {x[~np.isfinite(x)][0]}")
    if len(np.unique(x)) < 3:
        raise ValueError("a Weibull fit needs at least 3 different samples")
    low, spread = float(x.min()), float(x.std())
    best, best_value = None, -np.inf
    # The likelihood has no upper bound for shapes below 1, so fits of shape above 1 come first.
    starts: tuple[dict[str, float], ...] = ({}, {"loc": low - spread, "scale": 2 * spread})
    starts += ({"loc": low - 0.1 * spread, "scale": spread},)
    with np.errstate(all="ignore"):
        for start in starts:
            shape, shift, scale = weibull_min.fit(x, *((2.0,) if start else ()), **start)
            value = weibull_min.logpdf(x, shape, shift, scale).sum()
            if shape > 1 and np.isfinite(value) and value > best_value + 1e-7:
                best, best_value = Weibull(float(scale), float(shape), float(shift)), value
        if best is None:
            # A density that falls from its lower end: the smallest sample bounds the shift.
            shift = low - 1e-3 * spread
            shape, _, scale = weibull_min.fit(x, floc=shift)
            best = Weibull(float(scale), float(shape), shift)
    return best


def classify_by_energy(
    labels: Tensor,
    energies: Tensor,
    *,
    known: Weibull,
    unknown: Weibull,
    unknown_label: int = 80,
    outside: str = "keep",
) -> Tensor:
    """Relabel detections by the densities of their energies under two Weibull distributions.

    A detection whose energy is likelier unknown becomes unknown and keeps its score. Otherwise a
    detection that is labelled unknown is deleted, and another keeps its label.

    Args:
        labels: (N,) of int64.
        energies: of `energy` at temperature 1, (N,).
        known: fit of known detections.
        unknown: fit of unknown ones.
        unknown_label: default 80.
        outside: detections whose energy is near or below the lower end of a distribution "keep"
            their label (default; the official code on the PyTorch of its time) or become "unknown",
            since low energies are the least known-like ones.
    Returns:
        New labels, (N,); -100 for deleted detections.
    Raises:
        ValueError: outside is not one of the choices.
    """
    if outside not in OUTSIDE:
        raise ValueError(f"outside must be one of {', '.join(OUTSIDE)}, got {outside!r}")
    p_unknown, p_known = unknown.around(energies), known.around(energies)
    defined = ~(p_unknown.isnan() | p_known.isnan())
    likelier = defined & (p_unknown > p_known)
    if outside == "unknown":
        likelier |= ~defined
    deleted = ~likelier & (labels == unknown_label)
    if outside == "keep":
        deleted &= defined
    return labels.masked_fill(likelier, unknown_label).masked_fill(deleted, DELETED)


class EnergyIdentifier(nn.Module):
    """The decision of a detector. Its choices and fits are buffers, so that a checkpoint has them."""

    fits: Tensor
    choices: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Rows: known, unknown. Columns: scale, shape, shift. NaN: no fit.
        self.register_buffer("fits", torch.full((2, 3), torch.nan, dtype=torch.float64))
        # Index of the mode, index of `outside`, tail.
        self.register_buffer("choices", torch.tensor([0, 0, 0.05], dtype=torch.float64))

    def set(
        self,
        mode: str,
        *,
        known: Weibull | None = None,
        unknown: Weibull | None = None,
        tail: float = 0.05,
        outside: str = "keep",
    ) -> None:
        """Choose a mode and its fits.

        Args:
            mode: "off"; "known_tail": a known detection whose energy lies in the lowest `tail` of
                the known energies becomes unknown; "two_fits": `classify_by_energy`.
            known: fit of the energies of known detections.
            unknown: fit of those of unknown detections, for "two_fits".
            tail: share of known detections that "known_tail" gives up; default 0.05.
            outside: see `classify_by_energy`.
        Raises:
            ValueError: the mode is unknown, lacks a fit, or tail is not in (0, 1).
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if outside not in OUTSIDE:
            raise ValueError(f"outside must be one of {', '.join(OUTSIDE)}, got {outside!r}")
        if not 0 < tail < 1:
            raise ValueError(f"tail must lie in (0, 1), got {tail}")
        if mode != "off" and known is None:
            raise ValueError(f"mode {mode!r} needs a fit of known energies")
        if mode == "two_fits" and unknown is None:
            raise ValueError("mode 'two_fits' needs a fit of unknown energies")
        rows = [fit if fit is not None else (torch.nan,) * 3 for fit in (known, unknown)]
        self.fits.copy_(torch.tensor(rows, dtype=torch.float64))
        values = [MODES.index(mode), OUTSIDE.index(outside), tail]
        self.choices.copy_(torch.tensor(values, dtype=torch.float64))

    @property
    def mode(self) -> str:
        """One of `MODES`; "off" at first."""
        return MODES[int(self.choices[0])]

    @property
    def known(self) -> Weibull | None:
        """The fit of known energies."""
        return self._fit(0)

    @property
    def unknown(self) -> Weibull | None:
        """The fit of unknown energies."""
        return self._fit(1)

    def _fit(self, row: int) -> Weibull | None:
        values = self.fits[row].tolist()
        return None if math.isnan(values[0]) else Weibull(*values)

    def forward(self, labels: Tensor, logits: Tensor, seen: int, unknown_label: int) -> Tensor:
        """New labels (N,) of detections with logits (N, C); -100 for deleted detections."""
        mode, known, unknown = self.mode, self.known, self.unknown
        if mode == "off" or known is None:
            return labels
        energies = energy(widened(logits), seen)
        if mode == "known_tail":
            low = (energies < known.quantile(float(self.choices[2]))) & (labels < seen)
            return labels.masked_fill(low, unknown_label)
        assert unknown is not None
        return classify_by_energy(
            labels,
            energies,
            known=known,
            unknown=unknown,
            unknown_label=unknown_label,
            outside=OUTSIDE[int(self.choices[1])],
        )
