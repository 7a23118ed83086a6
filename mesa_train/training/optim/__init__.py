"""Optimizers that step in the backward, and AdamW with sharded 8-bit states."""
