"""DynamicViT: token pruning with learned predictors, for DeiT, LV-ViT, ConvNeXt and Swin."""

from mesa_train.models.lit.official import load_official as load_official

from . import convnext as convnext
from . import swin as swin
from . import vit as vit
