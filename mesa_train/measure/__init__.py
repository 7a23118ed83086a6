"""Measure a model: saved tensors, coverage, peak memory, a timeline of one step, and its time."""
