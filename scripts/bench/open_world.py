"""Open-world detection on composed digits: presets and baselines, on the quickstart's configuration.

Each variant is a run of recipes/open_world/train.py. Its evaluation rows, one for each stage with
and without energies, go to docs/results/open_world.jsonl. A run that is there already is not
repeated; a run that was killed continues.

    python scripts/bench/open_world.py --variants ore,faster_rcnn --policies plain,mesa8 --seeds 0,1,2

`--energies` evaluates finished runs in their last stage with other decisions by energies, fitted on
further composed pictures. It trains nothing. "known_tail_proposals" fits the energies of proposals
instead of detections, as the official code does.

    python scripts/bench/open_world.py --energies known_tail,known_tail_proposals,two_fits,transductive
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training.accelerated_run import WEIGHTS
from mesa_train.training.open_world import evaluation, fit
from mesa_train.training.open_world.config import load
from mesa_train.utils import records

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results/open_world.jsonl"
QUICKSTART = ROOT / "recipes/open_world/quickstart.yaml"
VARIANTS: dict[str, tuple[str, ...]] = {
    "ore": (),
    # No unknown labels and no clustering: the detector of section 4's first baseline.
    "faster_rcnn": (
        "method.unknowns_per_image=0",
        "method.cluster_weight=0",
        "method.energy=off",
    ),
    # Pseudo-unknown labels alone.
    "labels_only": ("method.cluster_weight=0",),
    "official_code": (
        "method.rules=official_code",
        "method.energy=two_fits",
        "method.transductive=true",
        "method.temperature=1.5",
    ),
}

# The decision of `evaluation.restored`, and changes of the configuration.
ENERGIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "known_tail": ("known_tail", ()),
    "known_tail_proposals": ("known_tail", ("method.samples=proposals",)),
    "known_tail_20": ("known_tail", ("method.tail=0.2",)),
    "two_fits": ("two_fits", ()),
    "transductive": ("transductive", ()),
}


def main(
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)}.")] = "ore,faster_rcnn",
    policies: Annotated[str, typer.Option(help="plain and presets, with commas.")] = "plain,mesa8",
    seeds: Annotated[str, typer.Option(help="With commas.")] = "0",
    energies: Annotated[
        str, typer.Option(help=f"Of finished runs, of {', '.join(ENERGIES)}; no training.")
    ] = "",
    set: Annotated[list[str], typer.Option(help="section.key=value, any number.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/open_world_bench"),
    results: Annotated[Path, typer.Option(help="File of the rows.")] = RESULTS,
) -> None:
    """Train the variants one after the other and append the evaluation rows of finished runs."""
    for option, given, choices in (
        ("variants", variants.split(","), VARIANTS),
        ("energies", energies.split(",") if energies else (), ENERGIES),
    ):
        for name in given:
            if name not in choices:
                raise SystemExit(f"--{option} must be of {', '.join(choices)}, got {name!r}")
    done = {(r["variant"], r["name"], r["seed"]) for r in records.read(results)}
    for variant in variants.split(","):
        for policy in policies.split(","):
            for seed in map(int, seeds.split(",")):
                folder = out / f"{variant}_{policy}_{seed}"
                if energies:
                    evaluate(folder, variant, energies.split(","), set, results)
                    continue
                if (variant, policy, seed) in done:
                    continue
                changes = (f"train.policy={policy}", f"train.seed={seed}", f"train.out={folder}")
                run = fit.prepare(load(QUICKSTART, (*VARIANTS[variant], *set, *changes)))
                fit.resume(run, "auto")
                rows = fit.fit(run)
                about = records.provenance()
                records.append(results, *({"variant": variant, **row, **about} for row in rows))


def evaluate(
    folder: Path, variant: str, energies: Sequence[str], changes: Sequence[str], results: Path
) -> None:
    """Append rows of a finished run's last stage with other decisions by energies.

    Rows that are there already and runs without weights are left out.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        print(f"{folder} is not finished")
        return
    for name in energies:
        mode, more = ENERGIES[name]
        config = fit.load_run(folder, (*more, *changes))
        train = config.train
        about = {"variant": variant, "name": train.policy, "seed": train.seed, "energy": name}
        about |= {"samples": config.method.samples}
        if any(all(r.get(k) == v for k, v in about.items()) for r in records.read(results)):
            continue
        run = evaluation.restored(config, weights, energy=mode)
        stage, identifier = run.stages[-1], run.model.heads.identifier
        both = {"known": identifier.known, "unknown": identifier.unknown}
        fits = {of: list(found) for of, found in both.items() if found is not None}
        row = {"kind": "evaluation", "step": stage.last, "stage": stage.name, "task": stage.task}
        row |= {"tail": config.method.tail, "rules": config.method.rules, "fits": fits}
        row |= {"repetitions": "drop"}
        scores = run.score(run.detect()).row()
        records.append(results, about | row | scores | records.provenance())
        print(f"{folder.name}, {name}: A-OSE {scores['aose']}, mAP {scores['map_known']:.3f}")


if __name__ == "__main__":
    typer.run(main)
