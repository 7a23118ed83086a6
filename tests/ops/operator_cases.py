"""The table of operator calls that every property in test_operators.py is tried on."""

from cases_of_attention import ATTENTION
from cases_of_convolution import CONVOLUTION
from cases_of_losses import LOSSES
from cases_of_others import OTHERS
from cases_of_pointwise import POINTWISE
from cases_of_products import PRODUCTS

CASES = [*PRODUCTS, *ATTENTION, *POINTWISE, *CONVOLUTION, *LOSSES, *OTHERS]
assert len({case.name for case in CASES}) == len(CASES)
