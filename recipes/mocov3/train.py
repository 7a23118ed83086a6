"""Self-supervised training of a ViT, or of any timm model, by MoCo v3 (arXiv 2104.02057).

    python recipes/mocov3/train.py --config recipes/mocov3/quickstart.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml recipes/mocov3/train.py \\
        --config recipes/mocov3/mocov3_vit_small.yaml --set data.path=IMAGENET

Labels are read for the evaluation by nearest neighbours alone. `--dry-run` prints the plan, with the
largest batch by policy and card, and stops.
"""

from mesa_train.training.command_line import TrainingCommand, script
from mesa_train.training.moco import fit as recipe
from mesa_train.training.moco.config import load
from mesa_train.training.moco.run import MocoRun, describe, plan


def fit(run: MocoRun) -> str:
    """Train to the end. Returns the last accuracy as text."""
    accuracy = recipe.fit(run)
    return "" if accuracy is None else f"nearest neighbours {accuracy:.2%}"


if __name__ == "__main__":
    script(TrainingCommand("mocov3", load, plan, recipe.prepare, recipe.resume, describe, fit))()
