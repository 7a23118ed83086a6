"""ViT-22B: the model, its initialisation, its parallelism and the conversion of checkpoints."""

from . import model as model
