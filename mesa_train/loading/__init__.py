"""Load a model with inputs, from a name or a user's factory."""
