"""Name the methods of a comparison, and put each on a model."""
