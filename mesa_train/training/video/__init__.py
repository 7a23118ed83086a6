"""A temporal probe over frozen features of frames (recipes/video)."""
