"""LITv1, LITv2 and their parts: HiLo attention, deformable token merging, official checkpoints."""

from . import early_attention as early_attention
from . import litv1 as litv1
from . import litv2 as litv2
