"""Tables about codes: the bits of each operand, codes that have no kernel, and means of channels."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from allocations import codes_of

from mesa_train.policy import PRESETS
from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.records import Row
from tables.text import markdown, origin, table


def origins(rows: Iterable[Row]) -> str:
    """The origins of all rows, a sentence for each machine, version, commit and date."""
    return " ".join(dict.fromkeys(origin(row) for row in rows))


def newest_of_models(rows: Sequence[Row]) -> list[Row]:
    """The rows with the commit of the last row of their model."""
    commits = {row["model"]: row["commit"] for row in rows}
    return [row for row in rows if row["commit"] == commits[row["model"]]]


def _batches(rows: Iterable[Row]) -> str:
    images = dict.fromkeys((row["model"], row["images"]) for row in rows)
    return "; ".join(f"{model}: {count} images" for model, count in images)


@table("presets.jsonl", "python scripts/bench/presets.py", by="kind", beside="presets.jsonl")
def presets(rows: Sequence[Row], every: Sequence[Row] = ()) -> str:
    """The newest rows of each model: single operands, or whole allocations.

    Rows of allocations without predictions get them from `every`, which has their operands' rows.
    """
    newest = [_with_prediction(row, every) for row in newest_of_models(rows)]
    if newest[0]["kind"] == "operand":
        return _operands(newest)
    lines = []
    for row in newest:
        shares = row["variance_shares"].items()
        lines.append(
            [
                row["model"],
                row["budget"],
                row["best_for"],
                ", ".join(f"{name} {code}" for name, code in row["codes"].items()),
                format_bytes(row["saved_bytes"]),
                "" if row["predicted_error"] is None else f"{row['predicted_error']:.2%}",
                f"{row['gradient_error']:.2%}",
                ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005),
            ]
        )
    head = ["model", "bytes of", "best for", "bits", "saved for the backward", "predicted"]
    joint = any(row["best_for"] == "all models" for row in newest)
    note = ' "All models" is the allocation whose largest predicted error is smallest.' * joint
    return markdown([*head, "measured", "shares of the variance"], lines) + (
        "\nThe prediction is the root of the sum of the squared errors of the operands. The shares are of this sum."
        f"{note} Groups have up to 128 elements unless stated. {_batches(newest)}. float32. {origins(newest)}\n"
    )


def _with_prediction(row: Row, every: Sequence[Row]) -> Row:
    """The row, with the prediction of the operands that were measured with it."""
    if row["kind"] == "operand" or "variance_shares" in row:
        return row
    alone = {
        (other["operand"], other["bits"]): other["gradient_error"] ** 2
        for other in every
        if other["kind"] == "operand"
        and (other["model"], other["commit"]) == (row["model"], row["commit"])
    }
    of_preset = codes_of(PRESETS[row["budget"]], dict.fromkeys(name for name, _ in alone))
    bits = row["bits"] or {name: code.bits for name, code in of_preset.items()}
    variances = {item[0]: alone[item] for item in bits.items() if item in alone}
    total = sum(variances.values())
    shares = {name: variance / total for name, variance in variances.items()}
    source = "this model" if row["bits"] else "the preset"
    predicted = {"predicted_error": total**0.5 if alone else None, "variance_shares": shares}
    return {**row, **predicted, "best_for": source, "codes": bits}


def _operands(newest: Sequence[Row]) -> str:
    """A line for each model and operand, a column for each code."""
    cells: dict[tuple[str, str], dict[tuple[int, int], str]] = {}
    for row in newest:
        if row.get("recompute") == "linear" and row["operand"] != "x_hat":
            continue
        name = row["operand"]
        name += ", matmuls recomputed from it" * (row.get("recompute") == "linear")
        code = (row["bits"], row.get("group_size", 128))
        cells.setdefault((row["model"], name), {})[code] = f"{row['gradient_error']:.2%}"
    codes = sorted({code for line in cells.values() for code in line}, reverse=True)
    lines = [[*name, *(line.get(code, "") for code in codes)] for name, line in cells.items()]
    head = [f"{bits} bits" + f", groups of {size}" * (size != 128) for bits, size in codes]
    return markdown(["model", "operand", *head], lines) + (
        "\nThe gradient error if one operand has codes, and all other stored tensors are uncompressed. float32; "
        f"relative L2 distance over all parameters. {_batches(newest)}. {origins(newest)}\n"
    )


@table("code_structure.jsonl", "python scripts/bench/code_structure.py", by="operand")
def code_structure(rows: Sequence[Row]) -> str:
    """The newest row of each model and code: a line for each code, a column for each model."""
    newest = {(row["model"], row["variant"]): row for row in rows}
    models = list(dict.fromkeys(model for model, _ in newest))
    bits = {}
    for model in models:
        first = newest.get((model, AFFINE))
        bits[model] = None if first is None else first["bits"]
    lines = []
    for variant in dict.fromkeys(variant for _, variant in newest):
        line = [variant]
        for model in models:
            row = newest.get((model, variant))
            line.append("" if row is None else _structured(row, bits[model]))
        lines.append(line)
    draws = sorted({row["draws"] for row in newest.values()})
    equal = any(bits.values()) * (
        f'; and the error at the bytes of "{AFFINE}", if each bit more halves an error'
    )
    return markdown(["code", *models], lines) + (
        f"\nThe gradient error with this code; the stored bits of an element{equal}. float32; mean of "
        f"{' or '.join(map(str, draws))} draws. {origins(newest.values())}\n"
    )


AFFINE = "affine, groups of 128"


def _structured(row: Row, bits: float | None) -> str:
    equal = "" if bits is None else f", {row['gradient_error'] * 2 ** (row['bits'] - bits):.2%}"
    return f"{row['gradient_error']:.2%}, {row['bits']:.2f}{equal}"


@table("mean_share.jsonl", "python scripts/bench/code_structure.py")
def mean_share(rows: Sequence[Row]) -> str:
    """The newest row of each model and operand: the shares of all layers."""
    newest = {(row["model"], row["operand"]): row for row in rows}
    lines = [
        [
            model,
            operand,
            f"{min(row['of_images']):.0%} to {max(row['of_images']):.0%}",
            f"{statistics.median(row['of_images']):.0%}",
            " ".join(f"{100 * share:.0f}" for share in row["of_images"]),
            " ".join(f"{100 * share:.0f}" for share in row["of_batch"]),
        ]
        for (model, operand), row in newest.items()
    ]
    head = ["model", "operand", "mean of each image", "median of the layers"]
    head += ["layer for layer, %", "mean of the batch, %"]
    return markdown(head, lines) + (
        "\nThe share of the energy (sum of squares) that the mean of each channel has: over the tokens of an image, "
        f"or of the batch. Layers in the order of the forward. {origins(newest.values())}\n"
    )


@table("trained_errors.jsonl", "python scripts/bench/trained_errors.py")
def trained_errors(rows: Sequence[Row]) -> str:
    """The newest row of each model and policy: a line for each policy of the last run, a column for each model."""
    rows = [row for row in rows if not row["policy"].startswith(_WIDER)]
    last = {row["policy"] for row in rows if row["commit"] == rows[-1]["commit"]}
    newest = {(row["model"], row["policy"]): row for row in rows if row["policy"] in last}
    models = list(dict.fromkeys(model for model, _ in newest))
    lines = []
    for policy in dict.fromkeys(policy for _, policy in newest):
        found = [newest.get((model, policy)) for model in models]
        lines.append(
            [
                policy.replace(", without overrides of", " without more bits for these"),
                *(
                    ""
                    if row is None
                    else f"{row['gradient_error']:.2%}, {format_bytes(row['saved_bytes'])}"
                    for row in found
                ),
            ]
        )
    batches = sorted({len(row["errors"]) for row in newest.values()})
    return markdown(["policy", *models], lines) + (
        "\nThe gradient error and the bytes saved for the backward. float32; mean of "
        f"{' or '.join(map(str, batches))} batches. {origins(list(newest.values()))}\n"
    )


_WIDER = "8 bits: "


@table("trained_errors.jsonl", "python scripts/bench/trained_errors.py --patterns ...")
def trained_operands(rows: Sequence[Row]) -> str:
    """The newest row of each pattern that has 8 bits, for one model."""
    newest = {row["policy"]: row for row in rows if row["policy"].startswith(_WIDER)}
    lines = [
        [
            "none" if policy == _WIDER else policy.removeprefix(_WIDER).replace(",", " and "),
            f"{row['gradient_error']:.2%}",
            format_bytes(row["saved_bytes"]),
        ]
        for policy, row in newest.items()
    ]
    batches = len(next(iter(newest.values()))["errors"])
    return markdown(["operands at 8 bits", "gradient error", "saved"], lines) + (
        "\n`mesa4` without more bits for these roles, and 8 bits for the named operands. "
        f"{rows[-1]['model']}, float32; mean of {batches} batches. {origins(list(newest.values()))}\n"
    )
