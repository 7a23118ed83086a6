"""Compare methods: measure each in a process of its own, or count on fake tensors."""
