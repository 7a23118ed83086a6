"""Profile a model for planning: what may be chosen, and what each choice takes in bytes, seconds and error."""
