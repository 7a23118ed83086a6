"""Tables about the recipes: LITv2's parity and attention, ViT-22B's estimates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from mesa_train.memory.text import format_bytes
from mesa_train.training import records
from mesa_train.training.records import Row
from tables.text import markdown, missing, origin


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
