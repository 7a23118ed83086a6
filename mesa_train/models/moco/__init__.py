"""MoCo v3 (arXiv 2104.02057): encoders, loss, a step in little memory, optimizers, checkpoints."""

from .backward import backward_by_view, features_in_chunks
from .encoder import MoCoViT, sincos_position
from .model import MoCo, gather_keys, moco_loss
from .official import load_official, read_official
from .optimizers import LARS, adamw, learning_rate, momentum

__all__ = [
    "LARS",
    "MoCo",
    "MoCoViT",
    "adamw",
    "backward_by_view",
    "features_in_chunks",
    "gather_keys",
    "learning_rate",
    "load_official",
    "moco_loss",
    "momentum",
    "read_official",
    "sincos_position",
]
