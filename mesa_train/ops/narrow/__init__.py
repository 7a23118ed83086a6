"""Rows that save neither a tensor nor 8-bit codes of it: bits, narrow integers, two-byte floats, recipes."""
