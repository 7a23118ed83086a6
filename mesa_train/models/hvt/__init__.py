"""HVT: plain ViTs whose token sequence is halved between blocks by max pooling."""

from mesa_train.models.lit.official import load_official as load_official

from . import model as model
