"""Tables about the families of models that people train, and about LoRA."""

from __future__ import annotations

from collections.abc import Sequence

from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.records import Row
from tables.text import markdown, origin, origins, table

# A model that saves less than this many times has a reason in its row.
ENOUGH = 2.5
_METHODS = ("mesa8", "mesa4", "mesa8-recompute", "checkpoint")


def _times(saved: dict[str, int], method: str) -> str:
    """Plain's bytes divided by a method's; empty if the method was not possible."""
    return f"{saved['plain'] / saved[method]:.1f}" if saved.get(method) else ""


def _step(row: Row) -> str:
    """The time of a step under mesa8, divided by plain's; empty if the row has no times."""
    times = row.get("step_ms")
    return f"{times['mesa8'] / times['plain']:.2f}" if times else ""


def _reason(row: Row) -> str:
    """The operators whose tensors mesa8 leaves uncompressed, with their share of mesa8's bytes."""
    saved = row["saved_bytes"]
    if saved["plain"] >= ENOUGH * saved["mesa8"]:
        return ""
    shares = {name: size / saved["mesa8"] for name, size in row["uncompressed"].items()}
    texts = [f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.05]
    return f"uncompressed: {', '.join(texts)}" if texts else "many small tensors"


@table("sweep_families.jsonl", "python scripts/bench/sweep_families.py", by="group")
def sweep_families(rows: Sequence[Row]) -> str:
    """The newest rows of one family, a line per model."""
    newest = {row["model"]: row for row in rows}
    head = ["model", "outputs", "lossless error", "mesa8 error", "plain saves", *_METHODS]
    head.append("mesa8 step")
    lines = []
    for name, row in newest.items():
        if row["failure"]:
            lines.append([name, f"fails: {row['failure']}", *[""] * (len(head) - 1)])
            continue
        saved = row["saved_bytes"]
        lines.append(
            [
                name,
                "equal" if row["outputs_equal"] else "differ",
                f"{row['lossless_error']:.0e}",
                f"{row['mesa8_error']:.2%}",
                format_bytes(saved["plain"]),
                *[_times(saved, method) for method in _METHODS],
                _step(row),
                _reason(row),
            ]
        )
    return markdown([*head, "why less than 2.5"], lines)


@table("sweep_families.jsonl", "python scripts/bench/sweep_families.py")
def families_summary(rows: Sequence[Row]) -> str:
    """The newest rows, a line per family: how many models, and the range of the factors."""
    newest = {row["model"]: row for row in rows}
    groups: dict[str, list[Row]] = {}
    for row in newest.values():
        groups.setdefault(row["group"], []).append(row)
    lines = []
    for group, members in groups.items():
        good = [row for row in members if not row["failure"]]
        cells = []
        for method in _METHODS:
            saved = [row["saved_bytes"] for row in good if method in row["saved_bytes"]]
            factors = sorted(s["plain"] / s[method] for s in saved)
            cells.append(f"{factors[0]:.1f} to {factors[-1]:.1f}" if factors else "")
        equal = sum(row["outputs_equal"] for row in good)
        few = sum(
            row["saved_bytes"]["plain"] < ENOUGH * row["saved_bytes"]["mesa8"] for row in good
        )
        worst = max((row["mesa8_error"] for row in good), default=0.0)
        counts = [str(len(members)), str(equal), f"{worst:.2%}"]
        lines.append([group, *counts, *cells, str(few)])
    head = ["family", "models", "equal outputs", "largest mesa8 error", *_METHODS]
    total = len(newest)
    return markdown([*head, f"under {ENOUGH}"], lines) + (
        f"\n{total} models in {len(groups)} families. Factors are plain's saved bytes divided by the "
        "method's, the smallest and the largest of a family. float32, random weights, small "
        f"configurations, min_bytes=1024. {origin(rows[-1])}\n"
    )


@table("sweep_timm.jsonl", "python scripts/bench/sweep_timm.py")
def sweep_timm(rows: Sequence[Row]) -> str:
    """The newest rows of timm's model files: ranges, small factors, and models that do not run."""
    return _sweep(rows)


@table("sweep_transformers.jsonl", "python scripts/bench/sweep_transformers.py")
def sweep_transformers(rows: Sequence[Row]) -> str:
    """The newest rows of transformers' models: ranges, small factors, and models that do not run."""
    return _sweep(rows)


def _sweep(rows: Sequence[Row]) -> str:
    """Ranges over all models, then a line for each model that saves little or does not run."""
    newest = {row["model"]: row for row in rows}
    good = {name: row for name, row in newest.items() if not row["failure"]}
    # Rounding errors decide these gradients.
    chaotic = {n: row for n, row in good.items() if row.get("perturbed_error", 0) > 0.05}
    head = ["models", "equal outputs", "lossless error", "mesa8 error"]
    methods = ("lossless", "mesa8", "mesa4", "mesa8-recompute")
    cells = [f"{len(good)}", f"{sum(row['outputs_equal'] for row in good.values())}"]
    for name in ("lossless", "mesa8"):
        errors = sorted(row[f"{name}_error"] for n, row in good.items() if n not in chaotic)
        middle, most = errors[len(errors) // 2], errors[-1]
        exact = name == "lossless"
        cells.append(f"{middle:.0e}, {most:.0e}" if exact else f"{middle:.2%}, {most:.2%}")
    for name in methods:
        saved = [row["saved_bytes"] for row in good.values()]
        factors = sorted(s["plain"] / s[name] for s in saved)
        cells.append(f"{factors[0]:.1f}, {factors[len(factors) // 2]:.1f}, {factors[-1]:.1f}")
    lines = [
        [f"`{name}`", _times(row["saved_bytes"], "mesa8"), _reason(row)]
        for name, row in good.items()
        if _reason(row)
    ]
    lines += [
        [
            f"`{name}`",
            _times(row["saved_bytes"], "mesa8"),
            f"no error: plain's gradient changes by {row['perturbed_error']:.0%} if each weight changes by 1e-7",
        ]
        for name, row in chaotic.items()
    ]
    lines += [
        [f"`{name}`", "", f"not compared: {row['failure'].splitlines()[0][:100]}"]
        for name, row in newest.items()
        if row["failure"]
    ]
    return (
        markdown([*head, *methods], [cells])
        + f"\nErrors: median, largest. Factors: smallest, median, largest. {origin(rows[-1])}\n\n"
        + markdown(
            ["model", "mesa8", "why less than 2.5, without an error, or not compared"], lines
        )
    )


@table("sweep_families.jsonl", "python scripts/bench/sweep_families.py")
def families_lora(rows: Sequence[Row]) -> str:
    """The newest rows of models with adapters."""
    newest = {row["model"]: row for row in rows if row.get("lora")}
    methods = ("plain", "checkpoint", "mesa8", "mesa4", "mesa8-recompute")
    lines = []
    for name, row in newest.items():
        full, saved = row["saved_bytes"]["plain"], row["lora"]["saved_bytes"]
        share = row["lora"]["trained"] / (row["parameters"] + row["lora"]["trained"])
        cells = [f"{full / saved[m]:.1f}" if m in saved else "" for m in methods]
        lines.append(
            [name, f"{share:.1%}", format_bytes(full), *cells, f"{row['lora']['mesa8_error']:.2%}"]
        )
    head = ["model", "trained", "plain, all trained", *[f"LoRA, {m}" for m in methods]]
    return markdown([*head, "LoRA, mesa8 error"], lines) + (
        "\nFactors are the bytes that plain PyTorch saves with all weights trained, divided by those of "
        f"LoRA (rank 8) with the method. {origin(rows[-1])}\n"
    )


@table("lora.jsonl", "python scripts/bench/lora.py")
def lora(rows: Sequence[Row]) -> str:
    """The newest rows of the newest model."""
    of_model = [row for row in rows if row["model"] == rows[-1]["model"]]
    newest = {(row["tuned"], row["method"]): row for row in of_model}
    lines = [
        [
            f"{tuned}, {method}",
            f"{row['trained'] / 1e6:.1f} M",
            format_bytes(row["static_bytes"]),
            format_bytes(row["saved_bytes_an_image"]),
            str(row["largest_batch"]),
        ]
        for (tuned, method), row in newest.items()
    ]
    row = rows[-1]
    head = ["trained, method", "parameters", "weights and AdamW", "saved an image"]
    return markdown([*head, f"largest batch in {row['budget']}"], lines) + (
        f"\n{row['model']}, {row['image_size']} px, {row['dtype']}; adapters of rank {row['rank']} on every "
        "Linear of the blocks; DoRA also trains a magnitude for each output feature. The largest batch is "
        "that of a whole step: weights, gradients, AdamW's states, and all tensors that the step "
        f"allocates. {origin(row)}\n"
    )


@table("libraries.jsonl", "python scripts/bench/libraries.py")
def libraries(rows: Sequence[Row]) -> str:
    """The newest row of each program and policy, a line per program and preset."""
    newest = {(row["program"], row["policy"]): row for row in rows}
    lines = []
    for (program, policy), row in newest.items():
        plain = newest.get((program, "plain"))
        if policy == "plain" or plain is None:
            continue
        apart = max(
            abs(a - b) / abs(b) for a, b in zip(row["losses"], plain["losses"], strict=True)
        )
        more = [(r["peak_bytes"] - r["one_image_bytes"]) / (r["images"] - 1) for r in (plain, row)]
        lines.append(
            [
                row["library"],
                row["model"],
                f"`{row['line']}`, {policy}",
                format_bytes(plain["peak_bytes"]),
                format_bytes(row["peak_bytes"]),
                f"{format_bytes(int(more[0]))}, {format_bytes(int(more[1]))}",
                f"{row['losses'][0] == plain['losses'][0]}",
                f"{apart:.2%}",
            ]
        )
    head = ["library", "model", "one line, preset", "plain's peak", "peak", "of an image more"]
    last = next(reversed(newest.values()))
    return markdown([*head, "first loss equal", "losses apart"], lines) + (
        "\nThe peak is the resident memory of the process, with Python, the libraries, weights and optimizer. Of an "
        "image more: the peak less that of plain with one image, for each further image; plain's, then the "
        f"preset's. Losses apart: the largest relative difference in {len(last['losses'])} steps. float32. "
        f"{origins(list(newest.values()))}\n"
    )
