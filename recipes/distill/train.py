"""Distillation of any classifier into any timm model, from a YAML file.

    python recipes/litv2/train.py --config recipes/litv2/quickstart.yaml       # a teacher
    python recipes/distill/train.py --config recipes/distill/quickstart.yaml   # its student

`--dry-run` prints the plan (steps, parameter groups, predicted memory, the teacher) and stops.
"""

from mesa_train.training.classification.command import script

if __name__ == "__main__":
    script("distill")()
