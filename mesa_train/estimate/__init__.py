"""The memory of sharded training before it runs: model states, activations, LoRA and launch files."""
