"""Operators over positions: convolutions, pooling, and the largest element."""
