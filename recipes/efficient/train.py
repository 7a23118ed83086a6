"""Training of HVT, DynamicViT, EcoFormer and SPViT from a YAML file.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/efficient/train.py \\
        --config recipes/efficient/hvt_quickstart.yaml --set train.policy=mesa4

`--dry-run` prints the plan (steps, parameter groups, predicted memory) and stops.
"""

from mesa_train.training.classification.command import script

if __name__ == "__main__":
    script("efficient")()
