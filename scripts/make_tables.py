"""Puts measured rows into the tables of README.md, docs and recipes.

A table stands between two markers, and everything between them is written by this script:

    <!-- table:step vit_small_patch16_224 -->
    <!-- /table -->

    python scripts/make_tables.py            rewrites the files
    python scripts/make_tables.py --check    fails if a file is not what the rows say

A new kind of table is a function from rows and the marker's words to Markdown, in TABLES.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.memory.text import format_bytes
from mesa_train.training import records
from mesa_train.training.records import Row

REPOSITORY = Path(__file__).resolve().parents[1]
MARKED = re.compile(
    r"(?P<open><!-- table:(?P<words>[^>]+?) -->\n)(?P<body>.*?)(?P<close><!-- /table -->)",
    re.DOTALL,
)


def main(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if stale.")] = False,
    root: Annotated[Path, typer.Option(help="Folder with README.md and docs.")] = REPOSITORY,
) -> None:
    """Rewrite every marked table from docs/results/*.jsonl."""
    stale = []
    folders = [path for name in ("docs", "recipes") for path in sorted((root / name).rglob("*.md"))]
    for path in [root / "README.md", *folders]:
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        try:
            renewed = renew(text, root / "docs/results")
        except ValueError as error:
            raise SystemExit(f"make_tables: {path.relative_to(root)}: {error}") from None
        if renewed == text:
            continue
        stale.append(str(path.relative_to(root)))
        if not check:
            path.write_text(renewed, encoding="utf-8")
    if check and stale:
        raise SystemExit(
            f"make_tables: {', '.join(stale)} differ from the rows; run scripts/make_tables.py"
        )


def renew(text: str, results: Path) -> str:
    """`text` with the body of every marked table made anew. ValueError for an unknown table."""

    def table(found: re.Match[str]) -> str:
        name, *words = found["words"].split()
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; choose from {', '.join(TABLES)}")
        return found["open"] + TABLES[name](results, words) + found["close"]

    if text.count("<!-- table:") != len(MARKED.findall(text)):
        raise ValueError("a table marker is not closed by <!-- /table -->")
    return MARKED.sub(table, text)


def step_table(results: Path, words: Sequence[str]) -> str:
    """`step MODEL`: the newest run of bench_step.py on a model."""
    if len(words) != 1:
        raise ValueError(f"the table 'step' takes one model, got {len(words)} words")
    (model,) = words
    rows = [row for row in records.read(results / "bench_step.jsonl") if row["model"] == model]
    if not rows:
        return missing("scripts/bench_step.py")
    newest = [row for row in rows if row["date"] == rows[-1]["date"]]
    head = [
        *("method", "kept for the backward", "less", "peak of the step", "gradient error"),
        *("step", "step vs. plain", "largest batch in 24 GiB"),
    ]
    lines = []
    for row in newest:
        if "note" in row:
            lines.append([row["method"], row["note"], *[""] * (len(head) - 2)])
            continue
        low, high = row["step_ratio_quartiles"]
        lines.append(
            [
                row["method"],
                format_bytes(row["kept_bytes"]),
                f"{row['kept_ratio']:.2f}x",
                format_bytes(row["peak_bytes"]) if row.get("peak_bytes") else "",
                f"{row['gradient_error']:.2%}",
                f"{row['step_ms']:.0f} ms",
                f"{row['step_ratio']:.2f} ({low:.2f} to {high:.2f})",
                str(row.get("largest_batch", "")),
            ]
        )
    any_row = newest[0]
    return markdown(head, lines) + (
        f"\n{model}, batch {any_row['batch_size']}, {any_row['dtype']}; gradient error: relative "
        "L2 distance from the plain float32 gradient over all parameters; peak: with weights and "
        "AdamW's states; largest batch: what is kept and those; step: forward, backward "
        f"and AdamW, median of {any_row['rounds']} rounds that take turns, quartiles in brackets. "
        f"{origin(any_row)}\n"
    )


def steps_table(results: Path, words: Sequence[str]) -> str:
    """`steps DEVICE`: the newest run of bench_step.py on every model, "less memory, step" a method."""
    if len(words) != 1:
        raise ValueError(f"the table 'steps' takes a kind of device, got {len(words)} words")
    rows = [r for r in records.read(results / "bench_step.jsonl") if r["device_type"] == words[0]]
    if not rows:
        return missing("scripts/bench_step.py")
    newest: dict[str, dict[str, Row]] = {}
    for row in rows:
        last = newest.setdefault(row["model"], {})
        if last and next(iter(last.values()))["date"] != row["date"]:
            last.clear()
        last[row["method"]] = row
    methods = ["mesa8", "mesa4", "mesa8-recompute", "checkpoint"]
    lines = []
    for model, found in newest.items():
        plain = found["plain"]
        size = plain["shapes"][0][-1]
        cells = [
            f"{found[m]['kept_ratio']:.1f}x, {found[m]['step_ratio']:.2f}" if m in found else ""
            for m in methods
        ]
        about = f"{plain['batch_size']} x {size} px"
        lines.append([model, about, format_bytes(plain["kept_bytes"]), *cells])
    head = ["model", "batch", "plain keeps", *methods]
    return markdown(head, lines) + (
        "\nHow many times less is kept, and the step's time by plain's (forward, backward, AdamW; "
        f"medians of rounds that take turns); bf16 autocast. {origin(rows[-1])}\n"
    )


def ops_table(results: Path, words: Sequence[str]) -> str:
    """`ops cpu` or `ops cuda`: the newest run of bench_ops.py on a kind of device, 8 and 4 bits."""
    if len(words) != 1:
        raise ValueError(f"the table 'ops' takes a kind of device, got {len(words)} words")
    rows = [r for r in records.read(results / "ops.jsonl") if r["device_type"] == words[0]]
    if not rows:
        return missing("scripts/bench_ops.py")
    newest = [row for row in rows if row["date"] == rows[-1]["date"]]
    head = ["operator", "on", "time", "a copy takes", "share"]
    lines = [
        [
            row["operator"],
            row["variant"],
            f"{row['time_us'] / 1e3:.2f} ms",
            f"{row['copy_us'] / 1e3:.2f} ms",
            f"{row['share']:.0%}",
        ]
        for row in newest
        if "2 bits" not in row["variant"]
    ]
    return markdown(head, lines) + (
        "\nAgainst a copy that reads and writes as many bytes, in turns, caches flushed before "
        f"each; medians of {newest[0]['rounds']}. {origin(newest[0])}\n"
    )


def parity_table(results: Path, words: Sequence[str]) -> str:
    """`parity`: final accuracies of train_parity.py, newest settings."""
    if words:
        raise ValueError(f"the table 'parity' takes no words, got {' '.join(words)}")
    rows = records.read(results / "train_parity.jsonl")
    if not rows:
        return missing("scripts/train_parity.py")
    settings = rows[-1]["settings"]
    final = records.in_order(
        row for row in rows if row["settings"] == settings and row["epoch"] == settings["epochs"]
    )
    head = ["policy", "kept for the backward", "final training loss", "held-out accuracy", "seeds"]
    lines = []
    for (name,), own in records.group_by(final, "name").items():
        own.sort(key=lambda row: row["seed"])
        accuracies = [100 * row["val_accuracy"] for row in own]
        spread = statistics.stdev(accuracies) if len(own) > 1 else 0.0
        lines.append(
            [
                name,
                format_bytes(own[0]["kept_bytes"]),
                f"{statistics.fmean(row['train_loss'] for row in own):.4f}",
                f"{statistics.fmean(accuracies):.2f} ± {spread:.2f} %",
                ", ".join(f"{accuracy:.1f}" for accuracy in accuracies),
            ]
        )
    return markdown(head, lines) + (
        f"\n{settings['model']} from scratch on {settings['train_images']:,} images of "
        f"{settings['data']}, {settings['epochs']} epochs, batch {settings['batch_size']}, "
        f"{settings['autocast']} autocast; mean and standard deviation over seeds. "
        f"{origin(final[-1])}\n"
    )


def families_table(results: Path, words: Sequence[str]) -> str:
    """`families`: the newest rows of bench_families.py, a line per model."""
    if words:
        raise ValueError(f"the table 'families' takes no words, got {' '.join(words)}")
    rows = records.read(results / "families.jsonl")
    if not rows:
        return missing("scripts/bench_families.py")
    newest = {(row["model"], row["method"]): row for row in rows}
    methods = list(dict.fromkeys(method for _, method in newest))
    presets = [method for method in methods if method != "plain"]
    head = ["model", "plain keeps", *[f"{p} keeps" for p in presets]]
    head += ["plain's gradient error", *[f"{p}'s" for p in presets]]
    lines = []
    for model in dict.fromkeys(model for model, _ in newest):
        own = {m: newest[model, m] for m in methods if (model, m) in newest}
        kept = [
            f"{format_bytes(row['saved_bytes'])}"
            + (f" ({row['saved_ratio']:.2f}x less)" if method != "plain" else "")
            for method, row in own.items()
        ]
        lines.append([model, *kept, *[f"{row['gradient_error']:.2%}" for row in own.values()]])
    return markdown(head, lines) + (
        f"\nBatch {rows[-1]['batch_size']}, {rows[-1]['dtype']}, random weights; gradient error: "
        "relative L2 distance from the plain float32 gradient over all parameters. "
        f"{origin(rows[-1])}\n"
    )


def rounding_table(results: Path, words: Sequence[str]) -> str:
    """`rounding`: the newest run of bench_rounding.py."""
    if words:
        raise ValueError(f"the table 'rounding' takes no words, got {' '.join(words)}")
    rows = records.read(results / "rounding.jsonl")
    if not rows:
        return missing("scripts/bench_rounding.py")
    lines = []
    for row in [row for row in rows if row["date"] == rows[-1]["date"]]:
        changes = row["changes"] and ", ".join(f"{k}={v}" for k, v in row["changes"].items())
        kept = format_bytes(row["kept_bytes"])
        lines.append([row["preset"], changes or "", kept, f"{row['gradient_error']:.2%}"])
    return markdown(["preset", "changed", "kept for the backward", "gradient error"], lines) + (
        f"\n{rows[-1]['model']}, batch {rows[-1]['batch_size']}, bf16 autocast, random "
        "initialisation; relative L2 distance from the plain float32 gradient over all "
        f"parameters. {origin(rows[-1])}\n"
    )


def plans_table(results: Path, words: Sequence[str]) -> str:
    """`plans`: the newest rows of bench_plan.py, predictions with measurements in brackets."""
    if words:
        raise ValueError(f"the table 'plans' takes no words, got {' '.join(words)}")
    rows = records.read(results / "plans.jsonl")
    if not rows:
        return missing("scripts/bench_plan.py")
    newest = {(row["model"], row["share"]): row for row in rows}
    head = ["model", "budget", "kept", "peak of the step", "time, plain = 1", "gradient error"]
    lines, off = [], {"kept_bytes": 0.0, "peak_bytes": 0.0, "time_ratio": 0.0}
    for (model, share), row in sorted(newest.items()):
        said, seen = row["predicted"], row["measured"]
        off = {k: max(v, abs(said[k] / seen[k] - 1)) for k, v in off.items()}
        kept, peak = (
            f"{format_bytes(said[k])} ({format_bytes(seen[k])})"
            for k in ("kept_bytes", "peak_bytes")
        )
        lines.append(
            [
                model if share == min(s for m, s in newest if m == model) else "",
                "least possible" if share == 0 else format_bytes(row["budget"]),
                kept,
                peak,
                f"{said['time_ratio']:.2f} ({seen['time_ratio']:.2f})",
                f"{said['gradient_error']:.2%} ({seen['gradient_error']:.2%})",
            ]
        )
    worst = ", ".join(f"{name} {off[key]:.1%}" for key, name in _PREDICTED.items())
    return markdown(head, lines) + (
        "\nPredicted, and measured in brackets; bf16 autocast, random weights; the peak is that of "
        "a whole training step with weights and AdamW's states. Furthest off: "
        f"{worst}. {origin(rows[-1])}\n"
    )


_PREDICTED = {"kept_bytes": "kept bytes", "peak_bytes": "peak", "time_ratio": "time"}


def compatibility_table(results: Path, words: Sequence[str]) -> str:
    """`compatibility SETUP`: the outcomes of tests/compose for one setup, a line per feature."""
    setup = " ".join(words)
    rows = records.read(results / "compatibility.jsonl")
    own = [row for row in rows if row["setup"] == setup]
    if not own:
        return "No rows yet: the command above makes them.\n"
    lines = [[row["feature"], row["outcome"], row["note"], str(row["tests"])] for row in own]
    versions = ", ".join(f"{name} {version}" for name, version in own[-1]["versions"].items())
    return markdown(["feature", "outcome", "note", "tests"], lines) + f"\n{versions}.\n"


def soak_table(results: Path, words: Sequence[str]) -> str:
    """`soak`: the newest row of soak.py for every policy."""
    if words:
        raise ValueError(f"the table 'soak' takes no words, got {' '.join(words)}")
    rows = records.read(results / "soak.jsonl")
    if not rows:
        return missing("scripts/soak.py")
    newest = {row["policy"]: row for row in rows}
    lines = [
        [
            policy,
            f"{row['steps']:,}",
            str(row["failed"]),
            f"{row['slope_bytes_per_step']:+.1f} bytes",
            format_bytes(row["resident_bytes"]),
            str(row["left"]),
        ]
        for policy, row in newest.items()
    ]
    head = ["policy", "steps", "of them failed", "growth per step", "resident at the end"]
    return markdown([*head, "stashes left behind"], lines) + (
        f"\n{rows[-1]['model']}, batch {rows[-1]['batch_size']}; growth: slope of resident memory "
        "over the second half of the steps; one process, policies in this order. "
        f"{origin(rows[-1])}\n"
    )


def litv2_parity_table(results: Path, words: Sequence[str]) -> str:
    """`litv2_parity`: last epochs of litv2_parity.py, a line per policy and number of processes."""
    if words:
        raise ValueError(f"the table 'litv2_parity' takes no words, got {' '.join(words)}")
    rows = records.read(results / "litv2_parity.jsonl")
    if not rows:
        return missing("scripts/litv2_parity.py")
    last: dict[tuple[str, int, int], Row] = {}
    for row in rows:
        last[row["name"], row["settings"]["processes"], row["seed"]] = row
    groups: dict[tuple[str, int], list[Row]] = {}
    for (name, processes, _), row in last.items():
        groups.setdefault((name, processes), []).append(row)
    lines = []
    for (name, processes), own in groups.items():
        accuracies = [100 * row["top1"] for row in own]
        whole = [row for row in own if row["minutes"]]  # those cut and continued have none
        lines.append(
            [
                name,
                str(processes),
                format_bytes(own[0]["kept_bytes"]),
                f"{statistics.fmean(accuracies):.2f} %",
                ", ".join(f"{accuracy:.1f}" for accuracy in accuracies),
                *[
                    f"{min(row[key] for row in whole):.1f}" if whole else "-"
                    for key in ("minutes", "processor_minutes")
                ],
            ]
        )
    head = ["policy", "processes", "kept for the backward", "held-out top-1", "seeds"]
    head += ["minutes, at best", "processor minutes, at best"]
    return markdown(head, lines) + (
        f"\nThe quickstart recipe, {rows[-1]['epoch']} epochs, the last epoch's accuracy; kept: of "
        "a micro-batch of one process. Other work shared the machine and paused some runs, hence "
        "the least of the minutes; processor minutes are those of all processes together. "
        f"{origin(rows[-1])}\n"
    )


def attention_table(results: Path, words: Sequence[str]) -> str:
    """`attention`: the newest run of bench_attention.py for every size of map."""
    if words:
        raise ValueError(f"the table 'attention' takes no words, got {' '.join(words)}")
    rows = records.read(results / "bench_attention.jsonl")
    if not rows:
        return missing("scripts/bench_attention.py")
    newest = {(row["side"], row["device_type"], row["layer"]): row for row in rows}
    lines = [
        [
            f"{row['layer']}, {row['side']}x{row['side']}",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['macs'] / 1e9:.3f} G",
            *[
                f"{row[key] / row['batch']:.1f} ms"
                for key in ("forward_ms", "train_ms", "mesa8_train_ms")
            ],
            format_bytes(row["kept_bytes"]),
            format_bytes(row["mesa8_kept_bytes"]),
        ]
        for row in newest.values()
    ]
    head = ["layer, tokens", "parameters", "multiply-adds", "forward", "training", "with mesa8"]
    head += ["keeps", "with mesa8"]
    one = rows[-1]
    return markdown(head, lines) + (
        f"\nOne layer of {one['dim']} channels and {one['heads']} heads behind a layer norm, bf16 "
        "autocast. Times per image, medians of rounds that take turns, after warm-up; bytes of "
        f"{one['count_batch']} images. {origin(one)}\n"
    )


def vit22b_table(results: Path, words: Sequence[str]) -> str:
    """`vit22b kept`, `vit22b fits` or `vit22b one_card`: the newest row of recipes/vit22b/estimate.py."""
    rows = records.read(results / "vit22b_estimates.jsonl")
    if not rows:
        return missing("recipes/vit22b/estimate.py")
    row = rows[-1]
    if words == ["kept"]:
        head = ["policy", "kept for one image"]
        lines = [[policy, format_bytes(size)] for policy, size in row["kept_bytes"].items()]
    elif words == ["one_card"]:
        keys = ("weights", "gradients", "optimizer", "activations")
        head = ["8 images, coded inputs", *keys]
        lines = [
            [e["scheme"], *[format_bytes(e[k]) for k in keys]] for e in row["one_card"].values()
        ]
    elif words == ["fits"]:
        policies = list(row["fits"][0]["images"])
        head = ["machine", "scheme", "states / card", "on the host", *policies]
        lines = [
            [
                f"{fit['machine']} GB",
                fit["scheme"],
                format_bytes(fit["states_bytes"]),
                format_bytes(fit["host_bytes"]) if fit["host_bytes"] else "",
                *[str(fit["images"].get(policy, "")) for policy in policies],
            ]
            for fit in row["fits"]
        ]
    else:
        raise ValueError(f"the table 'vit22b' is kept, fits or one_card, got {' '.join(words)!r}")
    about = f"{row['model']} at {row['image_size']} px, counted on the meta device, not measured."
    return markdown(head, lines) + f"\n{about} {origin(row)}\n"


def origin(row: Row) -> str:
    """Where a row was measured, in one sentence."""
    threads = f", {row['threads']} threads" if row["device_type"] == "cpu" else ""
    return (
        f"{row['device']}{threads}, PyTorch {row['versions']['torch']}, "
        f"commit {row['commit']}, {row['date'][:10]}."
    )


def missing(script: str) -> str:
    return f"No rows yet: `python {script}` makes them.\n"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *lines])


TABLES: dict[str, Callable[[Path, Sequence[str]], str]] = {
    "step": step_table,
    "parity": parity_table,
    "steps": steps_table,
    "ops": ops_table,
    "vit22b": vit22b_table,
    "families": families_table,
    "rounding": rounding_table,
    "plans": plans_table,
    "compatibility": compatibility_table,
    "soak": soak_table,
    "litv2_parity": litv2_parity_table,
    "attention": attention_table,
}


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
