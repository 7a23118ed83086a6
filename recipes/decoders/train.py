"""Decoders for segmentation and depth on the maps of any ViT, from a YAML file.

    python recipes/decoders/train.py --config recipes/decoders/quickstart_segmentation.yaml
    python recipes/decoders/train.py --config recipes/decoders/quickstart_depth.yaml

`--dry-run` prints the plan and stops.
"""

from mesa_train.training.decoders.config import load
from mesa_train.training.decoders.run import describe, plan, prepare
from mesa_train.training.recipe_command import Recipe, script

if __name__ == "__main__":
    script(Recipe("decoders", load, prepare, plan, describe, ("mean_iou", "abs_rel")))()
