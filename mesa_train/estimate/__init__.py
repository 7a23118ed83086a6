"""Estimate the memory of sharded training: model states, activations, LoRA and launch files."""
