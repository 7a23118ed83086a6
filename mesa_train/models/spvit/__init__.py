"""SPViT: attention layers pruned into convolutions, and MLPs pruned by unit, for DeiT and Swin."""

from mesa_train.models.lit.official import load_official as load_official

from . import deit as deit
from . import swin as swin
from .folding import fold as fold
