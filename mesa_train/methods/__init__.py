"""The methods that are compared: their names, and how each is put on a model."""
