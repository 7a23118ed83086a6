"""The overrides of the presets below 8 bits: which operands have more bits, and which have longer groups.

`scripts/bench/presets.py` searches for allocations. `scripts/bench/trained_errors.py` measures the presets.
"""

from __future__ import annotations

# An image gives one row of these to the gradient of a classifier, so few rounding errors average out (docs/log.md).
_LAST = {"last_norm": {"bits": 8}, "last_linear": {"bits": 8}}


def _with_more_bits(
    bits: int, batch_norm: int, norm_groups: int | None = None
) -> dict[str, dict[str, int]]:
    """More bits for the operands that add most to the gradient's error.

    Args:
        bits: of norms, of the inputs of activations, and of q and k.
        batch_norm: bits of batch norms.
        norm_groups: group size of layer and RMS norms; None: that of the policy.
    """
    norms = {"bits": bits}
    if norm_groups is not None:
        norms["group_size"] = norm_groups
    return {
        # The gradient of an offset is a difference of neighbouring values, so rounding errors weigh more.
        "deformable_conv": {"bits": 6},
        "layer_norm": norms,
        "rms_norm": norms,
        # The hidden layer of an MLP is wide, so long groups save more than the last norm costs.
        "activation": {"bits": bits, "group_size": 192},
        "attention.q": {"bits": bits},
        "attention.k": {"bits": bits},
        "batch_norm": {"bits": batch_norm},
    }


OF_MESA6 = {"batch_norm": {"bits": 8}, **_LAST}
OF_MESA4 = {**_with_more_bits(5, batch_norm=6), **_LAST}
OF_MESA3 = {**_with_more_bits(4, batch_norm=5), **_LAST}
# Matmuls are recomputed from the codes of a norm, so short groups pay there.
OF_MESA4_RECOMPUTE = {
    **_with_more_bits(5, batch_norm=6, norm_groups=96),
    "linear": {"group_size": 192},
    **_LAST,
}
