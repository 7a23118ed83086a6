"""Profile a model for planning: the choices, and the bytes, seconds and error of each choice."""
