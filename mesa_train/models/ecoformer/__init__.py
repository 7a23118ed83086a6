"""EcoFormer: linear attention over binary codes of queries and keys, in PVTv2 and Twins-SVT."""

from mesa_train.models.lit.official import load_official as load_official

from . import pvt as pvt
from . import twins as twins
from .fit import fit_hashes as fit_hashes
from .fit import hashes_fitted as hashes_fitted
