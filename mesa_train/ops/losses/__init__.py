"""The rows of losses. `derivative.py` has their node."""
