"""Tables about the recipes: LITv2's parity and attention, ViT-22B's estimates."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence

from mesa_train.utils.formatting import format_bytes
from mesa_train.utils.records import Row
from tables.text import Table, markdown, origin, table


@table("litv2_parity.jsonl", "python scripts/bench/litv2_parity.py")
def litv2_parity(rows: Sequence[Row]) -> str:
    """Last epochs, a line per policy and number of processes."""
    last: dict[tuple[str, int, int], Row] = {}
    for row in rows:
        last[row["name"], row["settings"]["processes"], row["seed"]] = row
    groups: dict[tuple[str, int], list[Row]] = {}
    for (name, processes, _), row in last.items():
        groups.setdefault((name, processes), []).append(row)
    lines = []
    for (name, processes), of_group in groups.items():
        accuracies = [100 * row["top1"] for row in of_group]
        complete = [row for row in of_group if row["minutes"]]  # those cut and continued have none
        lines.append(
            [
                name,
                str(processes),
                format_bytes(of_group[0]["saved_bytes"]),
                f"{statistics.fmean(accuracies):.2f} %",
                ", ".join(f"{accuracy:.1f}" for accuracy in accuracies),
                *[
                    f"{min(row[key] for row in complete):.1f}" if complete else "-"
                    for key in ("minutes", "processor_minutes")
                ],
            ]
        )
    head = ["policy", "processes", "saved for the backward", "held-out top-1", "seeds"]
    head += ["minutes, at best", "processor minutes, at best"]
    return markdown(head, lines) + (
        f"\nThe quickstart recipe, {rows[-1]['epoch']} epochs, accuracy of the last epoch. Saved bytes are "
        "of a micro-batch of one process. Other programs ran on the machine and paused some runs, so the "
        "minutes are the smallest of all seeds. Processor minutes are the sum over all processes. "
        f"{origin(rows[-1])}\n"
    )


@table("bench_attention.jsonl", "python scripts/bench/attention.py")
def attention(rows: Sequence[Row]) -> str:
    """The newest row of each layer and size of map, with the newest times of each."""
    times = ("forward_ms", "train_ms", "mesa8_train_ms")
    newest: dict[tuple[str, int], Row] = {}
    timings: dict[tuple[str, int], Row] = {}
    for row in rows:
        newest[row["layer"], row["side"]] = row
        if times[0] in row:
            timings[row["layer"], row["side"]] = row
    lines = [
        [
            f"{layer}, {side}x{side}",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['macs'] / 1e9:.3f} G",
            *_times_per_image(timings.get((layer, side)), times),
            format_bytes(row["saved_bytes"]),
            format_bytes(row["mesa8_saved_bytes"]),
        ]
        for (layer, side), row in newest.items()
    ]
    head = ["layer, tokens", "parameters", "multiply-adds", "forward", "training", "with mesa8"]
    head += ["saves", "with mesa8"]
    row = rows[-1]
    caption = (
        f"One layer of {row['dim']} channels and {row['heads']} heads behind a layer norm, bytes of "
        "bf16 autocast. Multiply-adds by the rules of the published benchmark, which leave QuadTree's "
        f"fine level out. Bytes of {row['count_batch']} images. "
    )
    if not timings:
        return markdown(head, lines) + f"\n{caption}Not timed yet. {origin(row)}\n"
    timing = [*timings.values()][-1]
    precision = {"no": "in float32", "bf16": "under bf16 autocast", "fp16": "under fp16 autocast"}
    caption += (
        f"Times per image {precision[timing['timed_in']]}, medians of rounds that take turns, after "
        "warm-up. "
    )
    return markdown(head, lines) + f"\n{caption}{origin(timing)}\n"


def _times_per_image(row: Row | None, keys: Sequence[str]) -> list[str]:
    """Milliseconds of one image, or dashes for a layer without times."""
    return [f"{row[key] / row['batch']:.1f} ms" if row else "-" for key in keys]


def _estimates(render: Callable[[Row], tuple[list[str], list[list[str]]]]) -> Table:
    """A table of the newest row of ViT-22B's estimates, from its head and lines."""

    @functools.wraps(render)
    def render_newest(rows: Sequence[Row]) -> str:
        row = rows[-1]
        caption = (
            f"{row['model']} at {row['image_size']} px, counted on the meta device, not measured."
        )
        return markdown(*render(row)) + f"\n{caption} {origin(row)}\n"

    return Table(render_newest, "vit22b_estimates.jsonl", "python recipes/vit22b/estimate.py", ())


@_estimates
def vit22b_kept(row: Row) -> tuple[list[str], list[list[str]]]:
    """Bytes saved for one image under every policy."""
    lines = [[policy, format_bytes(size)] for policy, size in row["saved_bytes"].items()]
    return ["policy", "saved for one image"], lines


@_estimates
def vit22b_one_card(row: Row) -> tuple[list[str], list[list[str]]]:
    """The parts of a step on one card."""
    keys = ("weights", "gradients", "optimizer", "activations")
    lines = [[e["scheme"], *[format_bytes(e[k]) for k in keys]] for e in row["one_card"].values()]
    return ["8 images, coded inputs", *keys], lines


@_estimates
def vit22b_fits(row: Row) -> tuple[list[str], list[list[str]]]:
    """Images that fit on every machine under every policy."""
    policies = list(row["fits"][0]["images"])
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
    return ["machine", "scheme", "states / card", "CPU memory", *policies], lines


@table("recipe_quickstarts.jsonl", "python scripts/bench/recipe_quickstarts.py", "recipe")
def recipe_quickstarts(rows: Sequence[Row]) -> str:
    """The newest row of each quickstart of a recipe."""
    newest = {row["name"]: row for row in rows}
    lines = []
    for row in newest.values():
        before, *_ = row["curve"]
        guess = row["chance"] if row["baseline"] is None else row["baseline"]
        seconds = row["processor_s"]
        lines.append(
            [
                " ".join([f"`{row['file']}`", *(f"`{c}`" for c in row["changes"])]),
                row["policy"],
                str(row["epochs"]),
                _SCORES[row["score"]],
                _score(row, guess),
                f"{_score(row, before[1])} after {before[0]}"
                if before[0]
                else _score(row, before[1]),
                _score(row, row["value"]),
                f"{seconds / 60:.1f}" if seconds else "-",
                f"step {row['killed_after']} of {row['steps']}: {'same' if row['same'] else 'differs'}"
                if "same" in row
                else "-",
            ]
        )
    place = "stage" if isinstance(rows[-1]["epochs"], str) else "epochs"
    head = ["quickstart", "policy", place, "score", "guess", "first", "last", "minutes"]
    head += ["killed after, resumed"]
    return markdown(head, lines) + (
        "\nHeld-out images. Guess: chance, or one answer for all pixels. First: before training, or after the "
        f"{place} of the first evaluation. Minutes of processor time, features and evaluations included. Killed by "
        "SIGKILL; `same`: the resumed run and the whole run have the same scores and weights, bit for bit. "
        f"Seed {rows[-1]['seed']}. {origin(rows[-1])}\n"
    )


_SCORES = {
    "knn": "nearest neighbours",
    "top1": "top-1",
    "mean_iou": "mean IoU",
    "abs_rel": "AbsRel (less is better)",
    "ap": "average precision of boxes",
    "miou": "mean IoU",
    "map_known": "mAP of known classes",
}


def _score(row: Row, value: float) -> str:
    """A score as text: errors of depths as numbers, shares in per cent."""
    return f"{value:.3f}" if row["score"] == "abs_rel" else f"{100 * value:.1f} %"


@table("moco_batch.jsonl", "python scripts/bench/moco_batch.py", "model")
def moco_batch(rows: Sequence[Row]) -> str:
    """The largest batches of a model, a line for each way and method."""
    cards = sorted({row["gib"] for row in rows})
    newest = {(r["way"], r["method"], r["gib"]): r for r in rows}
    pairs = dict.fromkeys((way, method) for way, method, _ in newest)
    order = ("joint", "by view", "chunks")
    lines = [
        [
            way,
            method,
            format_bytes(newest[way, method, cards[0]]["saved_per_image"]),
            *[f"{newest[way, method, gib]['largest_batch']:,}" for gib in cards],
        ]
        for way, method in sorted(pairs, key=lambda pair: order.index(pair[0]))
    ]
    head = ["way", "method", "saved for the backward, an image", *[f"{gib} GiB" for gib in cards]]
    return markdown(head, lines) + (
        "\nCounted on fake tensors, on one card, bf16 autocast, AdamW in float32, both views of the batch "
        "in float32 on the card, 2 GiB left free. joint: the authors' step. by view: one view's backward "
        "before the other's forward. chunks: by view, and the trunk in chunks of 64 images; what an image "
        f"saves is then that of the heads. {origin(rows[-1])}\n"
    )


@table("moco_gradients.jsonl", "python scripts/bench/moco_gradients.py")
def moco_gradients(rows: Sequence[Row]) -> str:
    """The newest row of each way: its loss and the error of its gradients."""
    newest = {row["way"]: row for row in rows}
    lines = [
        [
            way,
            f"{row['loss']:.4f}",
            f"{100 * row['gradient_error']:.3g} %" if row["gradient_error"] > 1e-4
            else f"{row['gradient_error']:.0e}",
            "yes" if row["same_as_joint"] else "no",
        ]
        for way, row in newest.items()
    ]  # fmt: skip
    row = rows[-1]
    return markdown(["way", "loss", "error of the gradient", "joint, bit for bit"], lines) + (
        f"\n`{row['model']}`, one step of {row['batch']} random images in float32, chunks of "
        f"{row['chunk']}. Error: relative L2 distance of all gradients from those of the joint step in "
        f"float64, whose loss is {row['reference_loss']:.4f}. {origin(row)}\n"
    )
