"""Training of detectors and segmenters from a YAML file.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/dense/train.py \\
        --config recipes/dense/quickstart_detection.yaml

`--dry-run` prints the plan (steps, parameter groups, predicted memory) and stops.
"""

from mesa_train.training.dense.command import training

if __name__ == "__main__":
    training()()
