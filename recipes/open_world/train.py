"""Open-world detection (ORE, arXiv 2103.02603): tasks in turn, replay, evaluation, pictures.

    python recipes/open_world/train.py --config recipes/open_world/quickstart.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml recipes/open_world/train.py \\
        --config recipes/open_world/owod_litv2_s.yaml --set data.lists=LISTS --set data.coco=COCO ...

`--dry-run` prints the plan (stages, steps, predicted memory) and stops.
"""

from mesa_train.training.command_line import TrainingCommand, script
from mesa_train.training.open_world import dry_run
from mesa_train.training.open_world import fit as recipe
from mesa_train.training.open_world.config import load
from mesa_train.training.open_world.run import OpenWorldRun, describe


def fit(run: OpenWorldRun) -> str:
    """Train all tasks. Returns the last metrics as text."""
    rows = recipe.fit(run)
    return recipe.shown(rows[-1]) if rows else ""


if __name__ == "__main__":
    script(
        TrainingCommand(
            "open_world",
            load,
            dry_run.report,
            recipe.prepare,
            recipe.resume,
            describe,
            fit,
            "Train a detector over all tasks",
        )
    )()
