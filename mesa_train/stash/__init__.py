"""Saved tensors as stashes: their lineage, the recorder, the backward cache and CPU offloading."""
