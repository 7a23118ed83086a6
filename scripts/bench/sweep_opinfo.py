"""Sweep of PyTorch's tested operators: every sample of every differentiable function.

Each sample runs under mesa_train's interception.

One row for each function goes to docs/results/sweep_opinfo.jsonl: samples run, samples whose
outputs differ, the largest lossless and 8-bit error of a gradient, and the failures.
tests/ops/test_opinfo.py runs a few samples of each function.

    python scripts/bench/sweep_opinfo.py
    python scripts/bench/sweep_opinfo.py --functions exp,nn.functional.conv2d
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils._pytree import tree_leaves, tree_map

from mesa_train import Policy, compress
from mesa_train.utils import records
from mesa_train.utils.records import Row

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/sweep_opinfo.jsonl"
POLICIES = {"lossless": Policy(bits=32, min_bytes=0), "mesa8": Policy(min_bytes=0)}


def main(
    functions: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    limit: Annotated[
        int, typer.Option("--limit", "--most", min=1, help="Most samples of a function.")
    ] = 100,
    out: Annotated[Path, typer.Option(help="JSON lines to append to.")] = RESULTS,
) -> None:
    """Run every function's samples in plain PyTorch, lossless and with 8 bits."""
    warnings.simplefilter("ignore")
    selected = {f.strip() for f in functions.split(",") if f.strip()}
    origin = records.provenance()
    for op in op_db:
        if not op.supports_autograd or torch.float64 not in op.supported_backward_dtypes("cpu"):
            continue
        if not selected or op.name in selected:
            records.append(out, {**row_of(op, limit), **origin})


def row_of(op: OpInfo, limit: int) -> Row:
    """The row of a function."""
    function = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
    row: Row = {
        "function": function,
        "samples": 0,
        "refused": 0,
        "outputs_differ": 0,
        "failures": [],
    }
    row.update({f"{policy}_error": 0.0 for policy in POLICIES})
    for number, sample in enumerate(op.sample_inputs("cpu", torch.float64, requires_grad=True)):
        if number == limit:
            break
        try:
            outputs, gradients = _run(op, sample, None)
        except Exception:  # PyTorch refuses the sample, so there is nothing to compare
            row["refused"] += 1
            continue
        row["samples"] += 1
        for name, policy in POLICIES.items():
            try:
                policy_outputs, policy_gradients = _run(op, sample, policy)
            except Exception as error:  # any error of an operator or of the fallback
                row["failures"].append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
                continue
            row["outputs_differ"] += not all(map(_same, policy_outputs, outputs))
            errors = [_error(a, b) for a, b in zip(policy_gradients, gradients, strict=True)]
            row[f"{name}_error"] = max([row[f"{name}_error"], *errors])
    return row


def _run(
    op: OpInfo, sample: Any, policy: Policy | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs and gradients of one sample, under a policy or in plain PyTorch."""
    torch.manual_seed(0)
    inputs = (sample.input, sample.args, sample.kwargs)
    leaves = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad]
    # The inputs are no leaves: a leaf that needs a gradient counts as a parameter, which is never
    # coded.
    input, args, kwargs = tree_map(_activation, inputs)
    if policy is None:
        output = op(input, *args, **kwargs)
    else:
        with compress(policy):
            output = op(input, *args, **kwargs)
    outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    tracked = [t for t in outputs if t.requires_grad]
    if not tracked:
        return outputs, []
    weights = [torch.ones_like(t) for t in tracked]
    return outputs, list(torch.autograd.grad(tracked, leaves, weights, allow_unused=True))


def _activation(value: Any) -> Any:
    """A copy with the same strides that is no leaf and no view of a leaf."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    if value.layout is not torch.strided or 0 in value.stride():
        return value.clone()
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)


def _same(output: Tensor, expected: Tensor) -> bool:
    """True if two outputs are equal, with NaNs equal too."""
    output, expected = output.detach(), expected.detach()
    if output.layout is not torch.strided:
        output, expected = output.to_dense(), expected.to_dense()
    if output.is_complex() and expected.is_complex():
        # PyTorch does not replace NaN in complex half numbers.
        output, expected = (torch.view_as_real(t.resolve_conj()) for t in (output, expected))
    return torch.equal(torch.nan_to_num(output, 7e7), torch.nan_to_num(expected, 7e7))


def _error(found: Tensor | None, exact: Tensor | None) -> float:
    """Relative L2 distance; absolute for a gradient smaller than 0.1 per element."""
    if found is None or exact is None or exact.layout is not torch.strided or not exact.numel():
        return 0.0 if (found is None) == (exact is None) else 1e9
    if not bool(exact.isfinite().all()):
        return 0.0
    distance = (found - exact).norm().item()
    return distance / max(exact.norm().item(), 0.1 * exact.numel() ** 0.5)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
