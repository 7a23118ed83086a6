"""Self-supervised training of a ViT, or of any timm model, by MoCo v3 (arXiv 2104.02057).

    python recipes/mocov3/train.py --config recipes/mocov3/quickstart.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml recipes/mocov3/train.py \\
        --config recipes/mocov3/mocov3_vit_small.yaml --set data.path=IMAGENET

Labels are read for the evaluation by nearest neighbours alone. A configuration with a section
`method` is a linear evaluation or a fine-tuning of such an encoder (linear.yaml, finetune_*.yaml).
`--dry-run` prints the plan, with the largest batch by policy and card, and stops.
"""

from mesa_train.training.moco.command import script

if __name__ == "__main__":
    script()()
