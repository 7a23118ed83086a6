"""Training of LITv2, or of any timm model, from a YAML file.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/litv2/train.py \\
        --config recipes/litv2/quickstart.yaml --set train.policy=mesa4

`--dry-run` prints the plan (steps, parameter groups, predicted memory) and stops.
"""

from mesa_train.training.classification.command import script

if __name__ == "__main__":
    script("litv2")()
