"""Open-world detection on composed digits: presets and baselines, on the quickstart's configuration.

Each variant is a run of recipes/open_world/train.py. Its evaluation rows, one for each stage with
and without energies, go to docs/results/open_world.jsonl. A run that is there already is not
repeated; a run that was killed continues.

    python scripts/bench/open_world.py --variants ore,faster_rcnn --policies plain,mesa8 --seeds 0,1,2
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mesa_train.training.open_world import fit
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


def main(
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)}.")] = "ore,faster_rcnn",
    policies: Annotated[str, typer.Option(help="plain and presets, with commas.")] = "plain,mesa8",
    seeds: Annotated[str, typer.Option(help="With commas.")] = "0",
    set: Annotated[list[str], typer.Option(help="section.key=value, any number.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/open_world_bench"),
    results: Annotated[Path, typer.Option(help="File of the rows.")] = RESULTS,
) -> None:
    """Train the variants one after the other and append the evaluation rows of finished runs."""
    done = {(r["variant"], r["name"], r["seed"]) for r in records.read(results)}
    for variant in variants.split(","):
        if variant not in VARIANTS:
            raise SystemExit(f"--variants must be of {', '.join(VARIANTS)}, got {variant!r}")
        for policy in policies.split(","):
            for seed in map(int, seeds.split(",")):
                if (variant, policy, seed) in done:
                    continue
                folder = out / f"{variant}_{policy}_{seed}"
                changes = (f"train.policy={policy}", f"train.seed={seed}", f"train.out={folder}")
                run = fit.prepare(load(QUICKSTART, (*VARIANTS[variant], *set, *changes)))
                fit.resume(run, "auto")
                rows = fit.fit(run)
                about = records.provenance()
                records.append(results, *({"variant": variant, **row, **about} for row in rows))


if __name__ == "__main__":
    typer.run(main)
